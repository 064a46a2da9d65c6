"""The `kitemq` command. Modules of verbs import the SDK inside their functions, so that `kitemq --help` is quick."""
