"""Methods that remove whole decoder layers (blocks), one file per paper; `surgery` carries out every cut."""
