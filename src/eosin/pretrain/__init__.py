"""Self-supervised pretraining of vision transformers on tiles of slides: DINOv2 and DINOv3 recipes."""
