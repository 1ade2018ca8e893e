package main

import (
	"context"
	"log/slog"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"firn.io/firn/cluster/meta"
	"firn.io/firn/internal/block"
)

const (
	// etcdQuiet is how long etcd is waited for before that is logged, and
	// etcdRepeat how often it is then.
	etcdQuiet  = 3 * time.Second
	etcdRepeat = 30 * time.Second
)

// etcdFlags say how to reach an external etcd.
type etcdFlags struct {
	endpoints string
	tls       certFiles
}

func (e *etcdFlags) register(f *pflag.FlagSet) {
	f.StringVar(&e.endpoints, "etcd", "", "etcd endpoints, separated by commas")
	f.StringVar(&e.tls.ca, "etcd-cacert", "", "PEM certificates that etcd's must be signed by (default the system's, for https endpoints)")
	f.StringVar(&e.tls.cert, "etcd-cert", "", "PEM certificate to show to etcd")
	f.StringVar(&e.tls.key, "etcd-key", "", "PEM key of --etcd-cert")
}

func (e *etcdFlags) config() (meta.EtcdConfig, error) {
	cfg := meta.EtcdConfig{Endpoints: strings.Split(e.endpoints, ",")}
	for i, ep := range cfg.Endpoints {
		cfg.Endpoints[i] = strings.TrimSpace(ep)
	}
	if (e.tls.cert == "") != (e.tls.key == "") {
		return cfg, block.Errorf(block.Invalid, "--etcd-cert and --etcd-key belong together")
	}
	if e.tls == (certFiles{}) {
		return cfg, nil // the client uses TLS by itself for https
	}
	var err error
	cfg.TLS, err = e.tls.load("etcd's")
	return cfg, err
}

// open connects to etcd and finds, or founds, the cluster. As long as etcd does
// not answer it waits, and says so: in the log, on a terminal, and as the reason
// why the role is not ready. ctx ends the wait.
func (e *etcdFlags) open(ctx context.Context, c *console, page *observed, parts *stack) (meta.Store, block.ClusterID, error) {
	cfg, err := e.config()
	if err != nil {
		return nil, block.ClusterID{}, err
	}
	page.waitsFor("etcd at %s does not answer yet", e.endpoints)
	var store meta.Store
	var found meta.ClusterMeta
	err = c.waiting(ctx, "waiting for etcd at "+e.endpoints, func(ctx context.Context) (err error) {
		for patience := etcdQuiet; ; patience = etcdRepeat {
			store, found, err = e.connect(ctx, cfg, patience)
			if err == nil || block.KindOf(err) != block.Unavailable || ctx.Err() != nil {
				return err
			}
			slog.Warn("waiting for etcd: start it, or correct --etcd", "etcd", e.endpoints, "why", err)
			page.waitsFor("%v", err)
		}
	})
	if err != nil {
		return nil, block.ClusterID{}, err
	}
	parts.push("etcd client", func(context.Context) error { return store.Close() })
	page.waitsFor("it is still starting")
	return store, found.ID, nil
}

func (e *etcdFlags) connect(ctx context.Context, cfg meta.EtcdConfig, patience time.Duration) (meta.Store, meta.ClusterMeta, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	store, err := meta.OpenEtcd(ctx, cfg)
	if err != nil {
		return nil, meta.ClusterMeta{}, err
	}
	found, err := meta.InitCluster(ctx, store, block.NewUUID())
	if err != nil {
		store.Close()
		return nil, found, err
	}
	return store, found, nil
}
