package meta_test

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"testing"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"

	"firn.io/firn/cluster/meta"
	"firn.io/firn/cluster/meta/metatest"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/clock"
	"firn.io/firn/internal/loop"
)

// TestEtcdInTheProcess runs the suite on an etcd as `firn up` has it: embedded,
// without a port.
func TestEtcdInTheProcess(t *testing.T) {
	t.Parallel()
	l := loop.NewSystem(clock.System{}, loop.DefaultLimits)
	defer l.Stop()
	cfg := embed.NewConfig()
	cfg.Name, cfg.Dir, cfg.LogLevel, cfg.LogOutputs = "test", t.TempDir(), "fatal", []string{t.TempDir() + "/etcd.log"}
	cfg.ListenPeerUrls, cfg.ListenClientUrls = nil, nil
	unused, err := url.Parse("http://127.0.0.1:2380")
	if err != nil {
		t.Fatal(err)
	}
	cfg.AdvertisePeerUrls, cfg.AdvertiseClientUrls = []url.URL{*unused}, []url.URL{*unused}
	cfg.InitialCluster = "test=" + unused.String()
	etcd, err := embed.StartEtcd(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer etcd.Close()
	<-etcd.Server.ReadyNotify()
	open := func(*testing.T) meta.Store { return meta.WrapEtcd(v3client.New(etcd.Server), "the embedded one") }
	metatest.Run(t, onSystem(l, open))
	u, err := open(t).(*meta.Etcd).Usage(context.Background())
	if err != nil || u.Bytes == 0 || u.Alarm() {
		t.Fatalf("usage %+v, %v", u, err)
	}
}

// TestEtcdGoesAwayAndComesBack: calls fail with Unavailable meanwhile, a mirror
// and a session go on afterwards.
func TestEtcdGoesAwayAndComesBack(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	l := loop.NewSystem(clock.System{}, loop.DefaultLimits)
	defer l.Stop()
	server := metatest.StartEtcd(t)
	s := openEtcd(t, server)
	defer s.Close()
	k := onSystem(l, nil)
	put := func(key string) error {
		_, err := s.Txn(ctx, meta.Txn{Then: []meta.Op{meta.Put(key, []byte("v"), 0)}})
		return err
	}
	var m *meta.Mirror
	var session *meta.Session
	l.Call(func() {
		m = meta.NewMirror(l, s, "/t/", func(meta.KV) {}, nil)
		m.Start(ctx)
		session = meta.NewSession(l, s, meta.OwnerTTL, func(meta.LeaseID) {}, nil)
		session.Start(ctx)
	})
	if err := put("/t/a"); err != nil {
		t.Fatal(err)
	}
	if !k.Until(func() bool { return m.Get("/t/a").Exists() && session.Valid() }) {
		t.Fatal("the mirror or the session did not come up")
	}
	server.Kill()
	if err := put("/t/b"); !errors.Is(err, block.Unavailable) {
		t.Fatalf("without etcd: %v", err)
	}
	if _, err := s.Usage(ctx); !errors.Is(err, block.Unavailable) {
		t.Fatalf("usage without etcd: %v", err)
	}
	if !k.Until(func() bool { return !session.Valid() }) {
		t.Fatal("the session never noticed")
	}
	server.Restart(t)
	if !k.Until(func() bool { return session.Valid() }) {
		t.Fatal("the session did not go on")
	}
	if err := put("/t/c"); err != nil {
		t.Fatal(err)
	}
	if !k.Until(func() bool { return m.Get("/t/c").Exists() }) {
		t.Fatal("the mirror did not go on")
	}
	l.Call(func() { m.Stop(); session.Stop(func(error) {}) })
}

func TestEtcdThatIsNotThere(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(context.Background(), 500*time.Millisecond)
	defer cancel()
	_, err := meta.OpenEtcd(ctx, meta.EtcdConfig{Endpoints: []string{"127.0.0.1:1"}})
	if !errors.Is(err, block.Unavailable) || len(fmt.Sprint(err)) > 300 {
		t.Fatalf("no etcd at all: %v", err)
	}
	if _, err := meta.OpenEtcd(ctx, meta.EtcdConfig{}); err == nil {
		t.Fatal("no endpoints, no error")
	}
}
