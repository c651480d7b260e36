"""Cache guards: regions of the graph that run only when something changed enough since they ran last."""
