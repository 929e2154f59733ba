"""Other packages that tokprune works in, or works on."""
