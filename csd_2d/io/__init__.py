"""Image and video files: nothing else reads or writes them."""
