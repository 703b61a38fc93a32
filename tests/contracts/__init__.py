"""What every part must pass, shipped or not; see docs/testing-your-part.md."""
