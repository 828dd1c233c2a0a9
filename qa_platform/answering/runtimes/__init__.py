"""The runtimes: the libraries that do a model's arithmetic, behind one interface (`base.Runtime`)."""
