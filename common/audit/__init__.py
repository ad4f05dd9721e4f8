"""The memorisation audit: whether synthetic images are closer to trained-on patients than to others like them."""
