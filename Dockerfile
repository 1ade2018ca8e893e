# Firn's images. They need no base image and no network: static programs, that
# `make images` has built into dist/, on nothing at all. Multi-stage only in the
# sense that one file makes two images: --target firn, --target etcd.
#
#   make images          builds dist/ and both images
#   docker-compose up    starts etcd, three nodes and a gateway

FROM scratch AS etcd
COPY dist/etcd /etcd
COPY --chown=65532:65532 dist/empty/ /data/
USER 65532:65532
VOLUME /data
EXPOSE 2379 2380
ENTRYPOINT ["/etcd"]

FROM scratch AS firn
COPY dist/firn /firn
COPY --chown=65532:65532 dist/empty/ /data/
USER 65532:65532
VOLUME /data
# NBD, admin API, HTTP of a gateway; gRPC and HTTP of a node.
EXPOSE 10809 7400 7480 7410 7490
ENTRYPOINT ["/firn"]
CMD ["--help"]
