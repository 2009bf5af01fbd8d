"""What a run would need and cost on TPU chips that are not there: nothing is executed."""
