"""`python -m train.compare`: methods by tasks by seeds on one base model."""
