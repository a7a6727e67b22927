"""What tests of several suites share; no test lives here."""
