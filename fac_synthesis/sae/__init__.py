"The sparse autoencoder: definition, pretraining, files of others, benchmark."
