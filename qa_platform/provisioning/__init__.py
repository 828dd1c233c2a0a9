"""A Pachyderm cluster's repo, secrets, roles and pipelines, as the platform needs them."""
