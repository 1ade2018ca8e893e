package main

import (
	"context"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"

	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"

	"firn.io/firn/cluster/meta"
	"firn.io/firn/internal/block"
)

// embeddedEtcd is the etcd of `firn up`: one member, in this process, reached
// by function calls only. It has no port, so nobody else can reach it and
// nothing can be in its way.
type embeddedEtcd struct {
	etcd  *embed.Etcd
	store *meta.Etcd
}

// Etcd's quota and compaction. A volume is one small key and nothing is written
// periodically but lease keep-alives, which make no revisions.
const (
	etcdQuotaBytes    = 1 << 30
	etcdCompactEvery  = "1000" // revisions
	etcdUnusedAddress = "http://127.0.0.1:2380"
)

// startEtcd opens the etcd in dir, made if it is missing, and returns once it
// answers. Its log goes to a file beside it.
func startEtcd(ctx context.Context, dir string) (*embeddedEtcd, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, block.Wrap(block.Unavailable, err, "embedded etcd")
	}
	// A member must have addresses, also one that listens on none.
	address, err := url.Parse(etcdUnusedAddress)
	if err != nil {
		return nil, block.Wrap(block.Internal, err, "embedded etcd")
	}
	cfg := embed.NewConfig()
	cfg.Name = "firn"
	cfg.Dir = dir
	cfg.ListenPeerUrls, cfg.ListenClientUrls = nil, nil
	cfg.AdvertisePeerUrls, cfg.AdvertiseClientUrls = []url.URL{*address}, []url.URL{*address}
	cfg.InitialCluster = cfg.Name + "=" + etcdUnusedAddress
	cfg.QuotaBackendBytes = etcdQuotaBytes
	cfg.AutoCompactionMode, cfg.AutoCompactionRetention = embed.CompactorModeRevision, etcdCompactEvery
	cfg.LogLevel = "warn"
	cfg.LogOutputs = []string{filepath.Join(dir, "etcd.log")}
	etcd, err := embed.StartEtcd(cfg)
	if err != nil {
		return nil, block.Wrap(block.Unavailable, err, "embedded etcd in %s (its log is etcd.log there)", dir)
	}
	select {
	case <-etcd.Server.ReadyNotify():
		return &embeddedEtcd{etcd, meta.WrapEtcd(v3client.New(etcd.Server), "this process")}, nil
	case err = <-etcd.Err():
	case <-etcd.Server.StopNotify():
		err = block.Errorf(block.Unavailable, "it stopped")
	case <-ctx.Done():
		err = ctx.Err()
	}
	etcd.Close()
	return nil, block.Wrap(block.Unavailable, err, "embedded etcd in %s (its log is etcd.log there)", dir)
}

// Close stops etcd after its last write is on disk.
func (e *embeddedEtcd) Close() {
	if err := e.store.Close(); err != nil {
		slog.Warn("close the client of the embedded etcd", "err", err)
	}
	e.etcd.Close()
}
