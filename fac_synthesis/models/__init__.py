"Backbones, language models, and every text that is sent to one."
