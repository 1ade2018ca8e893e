package meta_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"firn.io/firn/cluster/meta"
	"firn.io/firn/cluster/meta/metatest"
	"firn.io/firn/internal/clock"
	"firn.io/firn/internal/loop"
)

// proxy carries TCP connections to a server until it is cut.
type proxy struct {
	listener net.Listener
	to       string

	mu    sync.Mutex
	cut   bool
	conns []net.Conn
	wg    sync.WaitGroup
}

func newProxy(t *testing.T, to string) *proxy {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{listener: l, to: to}
	p.wg.Add(1)
	go p.accept()
	t.Cleanup(func() {
		l.Close()
		p.setCut(true)
		p.wg.Wait()
	})
	return p
}

func (p *proxy) accept() {
	defer p.wg.Done()
	for {
		in, err := p.listener.Accept()
		if err != nil {
			return
		}
		out, err := net.Dial("tcp", p.to)
		if err != nil || !p.keep(in, out) {
			in.Close()
			if out != nil {
				out.Close()
			}
			continue
		}
		p.wg.Add(2)
		for _, pair := range [][2]net.Conn{{in, out}, {out, in}} {
			go func() {
				defer p.wg.Done()
				io.Copy(pair[0], pair[1])
				pair[0].Close()
			}()
		}
	}
}

func (p *proxy) keep(conns ...net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.cut {
		p.conns = append(p.conns, conns...)
	}
	return !p.cut
}

// setCut ends all connections and refuses new ones, or lets them pass again.
func (p *proxy) setCut(cut bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cut = cut
	if cut {
		for _, c := range p.conns {
			c.Close()
		}
		p.conns = nil
	}
}

// TestAWatchSurvivesCompaction: what a cut-off watch has missed is compacted
// away before it is back, so etcd cannot tell it any more.
func TestAWatchSurvivesCompaction(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	l := loop.NewSystem(clock.System{}, loop.DefaultLimits)
	defer l.Stop()
	server := metatest.StartEtcd(t)
	direct, err := clientv3.New(clientv3.Config{Endpoints: []string{server.Endpoint}, DialTimeout: 2 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	writer := meta.WrapEtcd(direct, "the direct way")
	defer writer.Close()
	p := newProxy(t, strings.TrimPrefix(server.Endpoint, "http://"))
	reader, err := meta.OpenEtcd(ctx, meta.EtcdConfig{Endpoints: []string{"http://" + p.listener.Addr().String()}})
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()

	put := func(key string) meta.Revision {
		r, err := writer.Txn(ctx, meta.Txn{Then: []meta.Op{meta.Put(key, []byte("v"), 0)}})
		if err != nil {
			t.Fatal(err)
		}
		return r.Revision
	}
	put("/t/stays")
	put("/t/goes")
	k := onSystem(l, nil)
	resyncs := 0
	var stop func()
	var m *meta.Mirror
	l.Call(func() {
		stop = reader.Watch(l, "/t/", func(n meta.Notice) {
			if n.Resync {
				resyncs++
			}
		})
		m = meta.NewMirror(l, reader, "/t/", func(meta.KV) {}, nil)
		m.Start(ctx)
	})
	if !k.Until(func() bool { return len(m.Keys()) == 2 && resyncs == 1 }) {
		t.Fatal("the mirror did not come up")
	}
	p.setCut(true)
	if _, err := writer.Txn(ctx, meta.Txn{Then: []meta.Op{meta.Delete("/t/goes")}}); err != nil {
		t.Fatal(err)
	}
	var last meta.Revision
	for i := range 10 {
		last = put(fmt.Sprintf("/t/%d", i))
	}
	if _, err := direct.Compact(ctx, int64(last)); err != nil {
		t.Fatal(err)
	}
	p.setCut(false)
	if !k.Until(func() bool { return len(m.Keys()) == 11 && !m.Get("/t/goes").Exists() && m.Get("/t/9").Exists() }) {
		t.Fatal("the mirror did not catch up")
	}
	if !k.Until(func() bool { return resyncs == 2 }) {
		t.Fatal("the loss was not told")
	}
	l.Call(func() { stop(); m.Stop() })
}
