"""A regular package, since verl installs one of the same name, which Ray workers would import instead."""
