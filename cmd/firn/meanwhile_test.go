package main

import (
	"context"
	"net"
	"strings"
	"testing"
	"time"

	"firn.io/firn/internal/block"
	"firn.io/firn/nbd"
	"firn.io/firn/nbd/client"
)

// A gateway that waits for etcd tells its clients, and leaves the listeners to
// what serves them then.
func TestAnswersWhileItWaitsForEtcd(t *testing.T) {
	listenOn := func() net.Listener {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		return l
	}
	f := &fronts{nbd: listenOn(), api: listenOn(), creds: plaintext(), page: &observed{}}
	f.page.waitsFor("etcd at http://nowhere:2379 does not answer")
	stop := f.answerMeanwhile("gw1", "http://nowhere:2379", 0)

	firn := func(args string) (int, string) {
		var out strings.Builder
		con := &console{in: strings.NewReader(""), out: &out, err: &out}
		code := run(t.Context(), con, func(string) (string, bool) { return "", false }, strings.Fields(args+" --api "+f.api.Addr().String()))
		return code, out.String()
	}
	for args, exit := range map[string]int{"status": 0, "health": 1, "volume ls": 6} {
		begin := time.Now()
		code, text := firn(args)
		if took := time.Since(begin); code != exit || !strings.Contains(text, "runs and waits for etcd at http://nowhere:2379") || took > 5*time.Second {
			t.Errorf("firn %s: exit %d after %v:\n%s", args, code, took, text)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if _, err := client.Dial(ctx, f.nbd.Addr().String(), client.Options{Export: "demo"}); err == nil || !strings.Contains(err.Error(), "waits for etcd") {
		t.Errorf("an NBD client is told %v", err)
	}
	stop()

	// Whoever serves the listeners then has them for itself.
	server := nbd.NewServer(noExports{}, nbd.Options{})
	go func() { _ = server.Serve(f.nbd) }()
	defer server.Close()
	if _, err := client.Dial(ctx, f.nbd.Addr().String(), client.Options{Export: "demo"}); err == nil || !strings.Contains(err.Error(), "no such thing") {
		t.Errorf("after the wait an NBD client is told %v", err)
	}
}

type noExports struct{}

func (noExports) err() error { return block.Errorf(block.NotFound, "no such thing") }

func (n noExports) List(context.Context) ([]nbd.Info, error) { return nil, n.err() }

func (n noExports) Info(context.Context, string) (nbd.Info, error) { return nbd.Info{}, n.err() }

func (n noExports) Open(context.Context, string) (*nbd.Export, error) { return nil, n.err() }
