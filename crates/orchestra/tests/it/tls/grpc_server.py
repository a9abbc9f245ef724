"""A gRPC server that answers every call with what it was sent."""

import os
from concurrent.futures import ThreadPoolExecutor

import grpc


class Echo(grpc.GenericRpcHandler):
    def service(self, call):
        return grpc.unary_unary_rpc_method_handler(lambda request, context: request)


server = grpc.server(ThreadPoolExecutor(2))
server.add_generic_rpc_handlers((Echo(),))
server.add_insecure_port("127.0.0.1:" + os.environ["PORT_GRPC"])
server.start()
server.wait_for_termination()
