"Parameters, artifacts, stages, pipeline, pages: what the other rooms stand on."
