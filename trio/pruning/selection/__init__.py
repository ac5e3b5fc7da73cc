"""Selection by scores and features: NMS, farthest-point sampling, facility location."""
