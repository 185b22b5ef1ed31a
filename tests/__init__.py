"""The tests, a package so that ranks in other processes can import a test function by its name."""
