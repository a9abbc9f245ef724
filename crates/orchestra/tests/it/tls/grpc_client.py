"""Calls a gRPC server over TLS as each of the given names, trusting one file; prints what became of each call."""

import sys

import grpc

file, *targets = sys.argv[1:]
with open(file, "rb") as certificates:
    credentials = grpc.ssl_channel_credentials(certificates.read())
for target in targets:
    target, _, name = target.partition("=")
    options = [("grpc.ssl_target_name_override", name)] if name else []
    with grpc.secure_channel(target, credentials, options) as channel:
        try:
            print(channel.unary_unary("/test/Echo")(b"heard", timeout=10, wait_for_ready=False).decode())
        except grpc.RpcError as error:
            print(error.code(), error.details())
