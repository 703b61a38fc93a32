"""Parts that find mistakes in other parts: the plan checker, the fake runner, the sanitizer."""
