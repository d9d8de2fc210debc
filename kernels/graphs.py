"""CUDA graphs: a part of a decoding cycle is recorded once, then the host launches one thing instead of hundreds."""
import torch


class Graphs:
    """Calls parts of a cycle; on a GPU each is a CUDA graph, captured when its key first comes. Its result stays until
    its next call, or that of a graph captured before it: an engine's graphs share a memory pool, where a result is safe
    from later ones only. Each engine captures on its own stream: else they share cuBLAS' workspace, and free it."""

    def __init__(self, device, state):
        """state: tensors that a part changes in place; the warm-up before a capture leaves them as they were."""
        self.device, self.state, self.graphs = device, state, {}
        if device.type == "cuda":
            self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def __call__(self, key, part):
        """`part()`: of fixed shapes, reading no value on the host."""
        if self.device.type != "cuda":
            return part()
        if key not in self.graphs:
            self.graphs[key] = self.capture(part)
        graph, result = self.graphs[key]
        graph.replay()
        return result

    def capture(self, part):
        before = [x.clone() for x in self.state]
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for _ in range(2):                                                        # compiles kernels
                part()
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            result = part()
        torch._foreach_copy_(self.state, before)
        return graph, result
