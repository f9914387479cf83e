"""The gRPC server: an accepted call is an entry of a stream. Needs the extra `grpc`."""
