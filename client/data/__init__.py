"""Reading, checking and splitting a hospital's images. Nothing here leaves the site."""
