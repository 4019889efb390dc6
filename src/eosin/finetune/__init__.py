"""Fine-tuning an encoder on cells: tables, adapters, losses, training, and what a trained model is used for."""
