"""How an edit reaches a scene: in rounds of edited training images, or distilled into it."""
