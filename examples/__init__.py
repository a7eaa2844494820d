"""Camera-LiDAR fusion in bird's-eye view: the model and the data that the examples prune."""
