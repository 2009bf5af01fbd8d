"""The application: fine-tune a Flax model from a configuration file, and report on it."""
