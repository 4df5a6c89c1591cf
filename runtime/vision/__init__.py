"""Networks of images: from pictures to what a graph takes, and from what it gives to labels and boxes."""
