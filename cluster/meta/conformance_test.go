package meta_test

import (
	"context"
	"testing"
	"time"

	"firn.io/firn/cluster/meta"
	"firn.io/firn/cluster/meta/metatest"
	"firn.io/firn/internal/clock"
	"firn.io/firn/internal/loop"
)

func TestMemInAWorld(t *testing.T) {
	w := loop.NewWorld(1)
	server := w.NewLoop(nil)
	m := meta.NewMem(server)
	server.Post(func() { m.Drive(server) })
	metatest.Run(t, metatest.Kind{
		Open:  func(*testing.T) (meta.Store, loop.Loop) { return m.Client(), w.NewLoop(nil) },
		Until: func(cond func() bool) bool { return w.RunUntil(30*time.Second, cond) },
		Pass:  w.RunFor,
	})
}

func TestMemOnTheSystemLoop(t *testing.T) {
	t.Parallel()
	l := loop.NewSystem(clock.System{}, loop.DefaultLimits)
	defer l.Stop()
	m := meta.NewMem(clock.System{})
	l.Call(func() { m.Drive(l) })
	metatest.Run(t, onSystem(l, func(*testing.T) meta.Store { return m.Client() }))
}

func TestEtcd(t *testing.T) {
	t.Parallel()
	l := loop.NewSystem(clock.System{}, loop.DefaultLimits)
	defer l.Stop()
	server := metatest.StartEtcd(t)
	metatest.Run(t, onSystem(l, func(t *testing.T) meta.Store { return openEtcd(t, server) }))
}

func openEtcd(t *testing.T, server *metatest.Etcd) *meta.Etcd {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	s, err := meta.OpenEtcd(ctx, meta.EtcdConfig{Endpoints: []string{server.Endpoint}})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// onSystem is a kind in real time: conditions are asked on the loop, again and
// again by its timers.
func onSystem(l *loop.System, open func(*testing.T) meta.Store) metatest.Kind {
	return metatest.Kind{
		Open: func(t *testing.T) (meta.Store, loop.Loop) { return open(t), l },
		Until: func(cond func() bool) bool {
			result := make(chan bool, 1)
			l.Call(func() { poll(l, cond, l.Now().Add(30*time.Second), result) })
			return <-result
		},
		Pass: func(d time.Duration) {
			passed := make(chan struct{})
			l.Call(func() { l.After(d, func() { close(passed) }) })
			<-passed
		},
	}
}

func poll(l loop.Loop, cond func() bool, end clock.Instant, result chan<- bool) {
	if cond() {
		result <- true
		return
	}
	if l.Now() > end {
		result <- false
		return
	}
	l.After(5*time.Millisecond, func() { poll(l, cond, end, result) })
}
