"""Several runs beside each other: reading and comparing finished ones, and training the cells of a study."""
