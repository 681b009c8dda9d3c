"""The page of `t3d play`: its server, the frames of an answer, and the page itself."""
