"One module per research question."
