"""Programs that run apart from the tests; some tests run a part of them."""
