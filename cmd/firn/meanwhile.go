package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"

	"firn.io/firn/cluster/clusterpb"
	"firn.io/firn/internal/block"
	"firn.io/firn/nbd"
)

// nbdMeanwhile is how long NBD clients wait for a gateway that waits for etcd,
// before they are told: a gateway that merely starts keeps them waiting.
const nbdMeanwhile = 2 * time.Second

// meanwhile answers the clients of a gateway that waits for etcd: with errors
// that say so.
type meanwhile struct {
	id, etcd string
	fronts   *fronts
	// why is the reason why the gateway is not ready.
	why func() error
}

// answerMeanwhile serves the API and, after a while, NBD until stop is called,
// which leaves the listeners open for who serves them then.
func (f *fronts) answerMeanwhile(id, etcd string, patience time.Duration) (stop func()) {
	m := &meanwhile{id: id, etcd: etcd, fronts: f, why: func() error {
		ready, _ := f.page.now()
		return ready(context.Background())
	}}
	over := make(chan struct{})
	var wait sync.WaitGroup
	api := lend(f.api)
	server := grpc.NewServer(grpc.Creds(f.creds), grpc.MaxRecvMsgSize(1<<20), grpc.UnaryInterceptor(m.answer))
	clusterpb.RegisterAdminServer(server, clusterpb.UnimplementedAdminServer{})
	wait.Go(func() { _ = server.Serve(api) }) // it ends by Stop; a broken listener is found by who serves it next
	wait.Go(func() {
		select {
		case <-over:
		case <-time.After(patience):
			m.serveNBD(over)
		}
	})
	return func() {
		close(over)
		server.Stop()
		wait.Wait()
		api.giveBack()
	}
}

func (m *meanwhile) serveNBD(over <-chan struct{}) {
	access := m.fronts.access
	l := lend(m.fronts.nbd)
	server := nbd.NewServer(access.guard(m), nbd.Options{TLS: access.tls, RequireTLS: access.require})
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = server.Serve(l)
	}()
	<-over
	if err := server.Close(); err != nil {
		slog.Debug("stop refusing NBD clients", "err", err)
	}
	<-ended
	l.giveBack()
}

func (m *meanwhile) problem() error {
	return block.Errorf(block.Unavailable, "gateway %q runs and waits for etcd at %s: start it, or correct --etcd of the gateway (%v)", m.id, m.etcd, m.why())
}

// answer is the API: what is asked for status and health is told, the rest refused.
func (m *meanwhile) answer(_ context.Context, _ any, info *grpc.UnaryServerInfo, _ grpc.UnaryHandler) (any, error) {
	problems := []*clusterpb.Problem{{
		Severity: severityError, What: fmt.Sprintf("gateway %s runs and waits for etcd at %s", m.id, m.etcd),
		Remedy: fmt.Sprintf("start it, or correct --etcd of the gateway (%v)", m.why()),
	}}
	switch info.FullMethod {
	case clusterpb.Admin_Status_FullMethodName:
		return &clusterpb.StatusResponse{Version: version(), Gateway: m.id, NbdAddr: m.fronts.nbdAddr, Partial: true, Problems: problems}, nil
	case clusterpb.Admin_Health_FullMethodName:
		return &clusterpb.HealthResponse{Problems: problems}, nil
	}
	return nil, toStatus(m.problem())
}

// List implements nbd.Exports.
func (m *meanwhile) List(context.Context) ([]nbd.Info, error) { return nil, m.problem() }

// Info implements nbd.Exports.
func (m *meanwhile) Info(context.Context, string) (nbd.Info, error) { return nbd.Info{}, m.problem() }

// Open implements nbd.Exports.
func (m *meanwhile) Open(context.Context, string) (*nbd.Export, error) { return nil, m.problem() }

// lent is a listener that a server may close, and another one goes on with.
type lent struct {
	net.Listener
	closed atomic.Bool
}

func lend(l net.Listener) *lent { return &lent{Listener: l} }

// Accept implements net.Listener.
func (l *lent) Accept() (net.Conn, error) {
	if l.closed.Load() {
		return nil, net.ErrClosed
	}
	c, err := l.Listener.Accept()
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = net.ErrClosed
	}
	return c, err
}

// Close makes Accept end, and leaves the listener open.
func (l *lent) Close() error {
	l.closed.Store(true)
	return l.deadline(time.Unix(1, 0))
}

// giveBack is called when nobody is in Accept any more.
func (l *lent) giveBack() {
	if err := l.deadline(time.Time{}); err != nil && !errors.Is(err, net.ErrClosed) {
		slog.Warn("listener", "addr", l.Addr(), "err", err)
	}
}

// deadline is that of Accept; TCP and unix listeners have one.
func (l *lent) deadline(t time.Time) error {
	d, ok := l.Listener.(interface{ SetDeadline(time.Time) error })
	if !ok {
		return block.Errorf(block.Internal, "listener %v takes no deadline", l.Addr())
	}
	return d.SetDeadline(t)
}
