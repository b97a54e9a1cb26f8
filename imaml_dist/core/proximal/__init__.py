"""The proximal regularisers that tie task parameters to the meta-parameters; one shape of Lambda per file."""
