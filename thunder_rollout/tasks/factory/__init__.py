"""Bug-fix tasks out of real packages: their suites, with bugs injected that some tests notice."""
