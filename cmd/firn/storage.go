package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"firn.io/firn/cluster"
	"firn.io/firn/cluster/coordinator"
	"firn.io/firn/cluster/index"
	"firn.io/firn/cluster/index/pebblestore"
	"firn.io/firn/cluster/meta"
	"firn.io/firn/cluster/node"
	"firn.io/firn/cluster/transport"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/clock"
	"firn.io/firn/internal/loop"
	"firn.io/firn/internal/vfs"
	"firn.io/firn/internal/vfs/pebblefs"
)

// recoveryReaders is how many goroutines read a disk while it opens: enough to
// keep an SSD busy.
const recoveryReaders = 8

// storageConfig is what one storage node is started with.
type storageConfig struct {
	id        block.NodeID
	cluster   block.ClusterID
	listen    string
	advertise string
	zone      string
	disks     []node.DiskConfig
	store     meta.Store
	// replaceAfter is how long a node may be away before its replicas are made
	// elsewhere; 0: for ever.
	replaceAfter time.Duration
	// network makes the node's network for its loop and session.
	network func(l loop.Loop, id transport.Identity, name string) transport.Network
	metrics *prometheus.Registry
}

// storage is a running node, with its candidate for coordinator.
type storage struct {
	loop *loop.System
	node *node.Node
	fs   vfs.FS
	// store and session tell whether the node's place is another process's.
	store   meta.Store
	session uint64
}

// openError gives an error whose cause is on the command line the kind that
// says so.
func openError(cfg storageConfig, err error) error {
	var network *net.OpError
	switch {
	case errors.As(err, &network) && network.Op == "listen":
		return addressError("--listen", cfg.listen, err)
	case errors.Is(err, block.Invalid), errors.Is(err, block.NotFound):
		return block.Wrap(block.Invalid, err, "the node's folder cannot be used as asked for")
	}
	return err
}

// openStorage opens a node's disks; start makes it a node of the cluster. One that
// is not started is left as a crash would leave it.
func openStorage(ctx context.Context, cfg storageConfig, parts *stack) (*storage, error) {
	boot, err := bootID()
	if err != nil {
		return nil, err
	}
	name := fmt.Sprintf("node %d", cfg.id)
	l := loop.NewSystem(clock.System{}, loop.DefaultLimits)
	parts.push(name+"'s loop", func(context.Context) error { l.Stop(); return nil })

	session := randomNumber()
	network := cfg.network(l, transport.Identity{Hello: transport.Hello{Cluster: cfg.cluster, Node: cfg.id, Session: session}}, name)
	fs := vfs.NewOS()
	// The node outlives ctx, which ends when the process is asked to stop, until
	// it has been stopped in order.
	life := context.WithoutCancel(ctx)
	config := node.Config{
		ID: cfg.id, Cluster: cfg.cluster, Listen: cfg.listen, Advertise: cfg.advertise, Zone: cfg.zone, Boot: boot, Disks: cfg.disks,
		FS: fs, OpenStore: func(dir string, room *vfs.Reserve) (index.Store, error) {
			return pebblestore.Open(dir, pebblestore.Options{FS: pebblefs.New(fs, vfs.ClassIndex), Room: room, Log: slog.Default()})
		},
		Network: network, Meta: cfg.store, Loop: l, DiskLoop: func() loop.Loop { return l.Lane(loop.DefaultLimits) }, Incarnation: session, Created: time.Now().UTC().Format(time.RFC3339),
		Parallel:  recoveryReaders,
		NewDiskID: func() block.DiskID { return block.NewUUID() },
		Logf:      func(format string, args ...any) { slog.Info(fmt.Sprintf(format, args...), "node", cfg.id) },
	}
	var n *node.Node
	err = whileBusy(ctx, func() error {
		n, err = node.Open(life, config)
		return err
	})
	if err != nil {
		return nil, openError(cfg, err)
	}
	return &storage{loop: l, node: n, fs: fs, store: cfg.store, session: session}, nil
}

// start starts the node and its candidate for coordinator, and pushes their stops
// on parts.
func (s *storage) start(ctx context.Context, cfg storageConfig, parts *stack) error {
	var err error
	if !s.loop.Call(func() { err = s.node.Start() }) || err != nil {
		return openError(cfg, err)
	}
	parts.push(fmt.Sprintf("node %d", cfg.id), s.stop)
	cfg.metrics.MustRegister(nodeMetrics(strconv.Itoa(int(cfg.id)), s.fs, s.status))
	s.coordinate(ctx, cfg, parts)
	return nil
}

// startClient starts a client on its loop and pushes its stop on parts. It
// outlives ctx, which ends when the process is asked to stop.
func startClient(ctx context.Context, name string, cfg cluster.Config, parts *stack) *cluster.Client {
	c := cluster.New(cfg)
	cfg.Loop.Post(func() { c.Start(context.WithoutCancel(ctx)) })
	parts.push(name, func(ctx context.Context) error { return await(ctx, cfg.Loop, c.Stop) })
	return c
}

// coordinate lets the node campaign as coordinator, with a client of its own
// that carries deletions to the groups.
func (s *storage) coordinate(ctx context.Context, cfg storageConfig, parts *stack) {
	name := fmt.Sprintf("node %d's coordinator", s.node.ID())
	network := cfg.network(s.loop, transport.Identity{Hello: transport.Hello{Cluster: cfg.cluster, Session: randomNumber()}}, name)
	client := startClient(ctx, name+"'s client", cluster.Config{Loop: s.loop, Store: cfg.store, Network: network, Cluster: cfg.cluster, Log: slog.Default()}, parts)
	c := coordinator.New(coordinator.Config{Loop: s.loop, Store: cfg.store, Node: s.node.ID(), Deleter: client,
		ReplaceAfter: cfg.replaceAfter, Log: slog.Default()})
	s.loop.Post(func() { c.Start(context.WithoutCancel(ctx)) })
	cfg.metrics.MustRegister(coordinatorMetrics(strconv.Itoa(int(cfg.id)), func() (st coordinator.Status, ok bool) {
		ok = s.loop.Call(func() { st = c.Status() })
		return st, ok
	}))
	parts.push(name, func(ctx context.Context) error {
		return await(ctx, s.loop, func(done func(error)) { c.Stop(func() { done(nil) }) })
	})
}

func (s *storage) stop(ctx context.Context) error { return await(ctx, s.loop, s.node.Stop) }

func (s *storage) status() (st node.Status, ok bool) {
	ok = s.loop.Call(func() { st = s.node.Status() })
	return st, ok
}

// ready tells why another node should not be taken away now: this one has not
// started, or has replicas that do not follow their leaders yet.
func (s *storage) ready(ctx context.Context) error {
	if err := s.started(ctx); err != nil {
		return err
	}
	st, ok := s.status()
	if !ok {
		return block.Errorf(block.Unavailable, "node %d is stopping", s.node.ID())
	}
	if !st.GivenKnown {
		return block.Errorf(block.Unavailable, "node %d does not know yet which replicas the cluster gives it", s.node.ID())
	}
	if st.Missing > 0 {
		return block.Errorf(block.Unavailable, "node %d: %d of %d replicas that the cluster gives this node are not on its disks: check --disk, what is mounted there, and whether a disk has failed", s.node.ID(), st.Missing, st.Given)
	}
	if behind := behind(st); behind > 0 {
		return block.Errorf(block.Unavailable, "node %d is catching up: %d of %d replicas have no leader, or not applied what it committed",
			s.node.ID(), behind, len(st.Replicas))
	}
	return nil
}

// behind counts the replicas that do not follow their leader, but those on disks
// that failed.
func behind(st node.Status) int {
	failed := map[block.DiskID]bool{}
	for _, d := range st.Disks {
		failed[d.ID] = d.Failed != ""
	}
	n := 0
	for _, r := range st.Replicas {
		if !failed[r.Disk] && (!r.Open || r.Leader == 0 || r.Applied < r.Committed) {
			n++
		}
	}
	return n
}

// started tells why the node has not.
func (s *storage) started(context.Context) error {
	var why error
	if !s.loop.Call(func() { why = s.node.Unready() }) {
		return block.Errorf(block.Unavailable, "node %d is stopping", s.node.ID())
	}
	if why != nil {
		return block.Wrap(block.KindOf(why), why, "node %d is not ready", s.node.ID())
	}
	return nil
}

// awaitStarted waits until the node has started. Busy: another process is that
// node, for longer than its lease would last without it.
func (s *storage) awaitStarted(ctx context.Context) error {
	waiting, cancel := context.WithCancel(ctx)
	defer cancel()
	var since time.Time // that another process is this node
	err := awaitReady(waiting, func(ctx context.Context) error {
		err := s.started(ctx)
		switch {
		case err == nil || block.KindOf(err) != block.Busy:
			since = time.Time{}
		case since.IsZero():
			since = time.Now()
		case time.Since(since) > registerTime:
			cancel() // its lease would have ended
		}
		return err
	})
	if err == nil {
		return nil
	}
	asking, cancel := context.WithTimeout(context.WithoutCancel(ctx), pageTimeout)
	defer cancel()
	live, listErr := meta.ListLive(asking, s.store)
	if l, ok := live[s.node.ID()]; listErr == nil && ok && l.Incarnation != s.session {
		return block.Errorf(block.Busy, "node %d is running already, at %s: give this one another --id, or stop that one", s.node.ID(), l.Addr)
	}
	return err
}

// await starts something on the loop and waits for its answer.
func await(ctx context.Context, l loop.Loop, start func(done func(error))) error {
	answer := make(chan error, 1)
	l.Post(func() { start(func(err error) { answer <- err }) })
	select {
	case err := <-answer:
		return err
	case <-ctx.Done():
		return block.Wrap(block.Canceled, ctx.Err(), "wait for an orderly stop")
	}
}

// awaitReady asks until ready holds. When ctx ends it returns the last reason
// that is not ctx's own end.
func awaitReady(ctx context.Context, ready func(context.Context) error) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	var why error
	for {
		err := ready(ctx)
		if err == nil {
			return nil
		}
		if why == nil || ctx.Err() == nil {
			why = err
		}
		// Asked first: of two that are ready, select takes either.
		if ctx.Err() != nil {
			return why
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return why
		}
	}
}
