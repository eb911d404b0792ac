"""Models: found, loaded (safetensors only), taken in from other forms, adapted, held in few bits, saved."""
