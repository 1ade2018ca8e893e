// Package sim runs a whole cluster in one goroutine and virtual time: three
// storage nodes, a coordinator and a gateway, all of production code, over a
// simulated network, simulated disks and a metadata server in memory. Crashes,
// torn writes, losses, partitions and pauses are drawn from one seed; the same
// seed gives the same run, event by event.
//
//	go test ./test/sim -run TestSeed -seed 17     replays one
//	FIRN_SIM_SEEDS=500 go test ./test/sim         runs many
package sim

import (
	"context"
	"encoding/binary"
	"fmt"
	"hash"
	"hash/fnv"
	"io"
	"time"

	"firn.io/firn/cluster/coordinator"
	"firn.io/firn/cluster/index"
	"firn.io/firn/cluster/index/memstore"
	"firn.io/firn/cluster/meta"
	"firn.io/firn/cluster/node"
	"firn.io/firn/cluster/transport"
	simnet "firn.io/firn/cluster/transport/sim"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/clock"
	"firn.io/firn/internal/loop"
	"firn.io/firn/internal/vfs"
)

// Options of a run.
type Options struct {
	Seed  uint64
	Nodes int
	// VolumeBytes is the size of the volume under load.
	VolumeBytes int64
	// Writers is how many operations are in flight.
	Writers int
	// Duration is how long faults happen, in virtual time.
	Duration time.Duration
	// Log takes what nodes say; nil drops it.
	Log io.Writer
}

// Cluster is a simulated cluster.
type Cluster struct {
	World *loop.World
	Net   *simnet.Net
	Meta  *meta.Mem

	opt       Options
	ctx       context.Context
	id        block.ClusterID
	diskBytes int64
	nodes     []*storage
	gateway   *gatewayProcess
	start     clock.Instant

	failure error
	events  uint64
	trace   hash.Hash64
}

// storage is one node: the machine, which survives crashes, and the process.
type storage struct {
	c     *Cluster
	id    block.NodeID
	fs    *vfs.Sim
	store *memstore.Store // what the disk holds of the index

	loop *loop.Sim // nil while the process is down
	node *node.Node
}

func newCluster(opt Options) *Cluster {
	w := loop.NewWorld(opt.Seed)
	c := &Cluster{World: w, Net: simnet.New(w), opt: opt, ctx: context.Background(), start: w.Now(), trace: fnv.New64a()}
	c.id = c.uuid()
	c.diskBytes = largeDisk
	if w.Rand().IntN(3) == 0 {
		c.diskBytes = smallDisk
	}
	server := w.NewLoop(nil)
	c.Meta = meta.NewMem(server)
	server.Post(func() { c.Meta.Drive(server) })
	return c
}

// uuid draws an id from the seed.
func (c *Cluster) uuid() (u [16]byte) {
	binary.LittleEndian.PutUint64(u[:], c.World.Rand().Uint64())
	binary.LittleEndian.PutUint64(u[8:], c.World.Rand().Uint64())
	return block.MarkUUID(u)
}

func (c *Cluster) since(t clock.Instant) time.Duration { return t.Sub(c.start) }

func (c *Cluster) logf(format string, args ...any) {
	if c.opt.Log != nil {
		fmt.Fprintf(c.opt.Log, "%12v  %s\n", c.since(c.World.Now()), fmt.Sprintf(format, args...))
	}
}

// step runs one event and takes its instant into the trace.
func (c *Cluster) step() bool {
	if !c.World.Step() {
		return false
	}
	c.events++
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], uint64(c.World.Now()))
	c.trace.Write(b[:])
	return true
}

// runFor runs the next d of virtual time.
func (c *Cluster) runFor(d time.Duration) { c.runUntil(d, func() bool { return false }) }

// runUntil runs events until cond holds or limit has passed; it returns cond().
func (c *Cluster) runUntil(limit time.Duration, cond func() bool) bool {
	over := false
	c.World.At(c.World.Now().Add(limit), func() { over = true })
	for !over && c.failure == nil && !cond() && c.step() {
	}
	return cond()
}

func nodeName(id block.NodeID) string { return fmt.Sprintf("node%d", id) }

func (c *Cluster) addNode(id block.NodeID) *storage {
	s := &storage{c: c, id: id}
	s.newDisk()
	c.nodes = append(c.nodes, s)
	return s
}

// pace is that of a disk of 64 MiB, so that everything happens in a short run.
var pace = node.Pace{
	SegmentBytes:      2 << 20,
	LogBytes:          6 << 20,
	CheckpointUpdates: 4000,
	CheckpointAge:     2 * time.Second,
	Upkeep:            100 * time.Millisecond,
}

// up starts the process of a node.
func (s *storage) up() error {
	c := s.c
	s.loop = c.World.NewLoop(nil)
	me := nodeName(s.id)
	incarnation := c.World.Rand().Uint64()
	cfg := node.Config{
		ID: s.id, Cluster: c.id, Listen: me, Boot: me, FS: s.fs, Meta: c.Meta.Client(), Loop: s.loop, Incarnation: incarnation,
		Disks:     []node.DiskConfig{{Dir: diskDir, CapacityBytes: c.diskBytes}},
		OpenStore: func(string) (index.Store, error) { return s.openStore() },
		Network: c.Net.Network(me, s.loop, transport.Identity{Hello: transport.Hello{
			Cluster: c.id, Node: s.id, Session: incarnation}}),
		NewDiskID: func() block.DiskID { return c.uuid() },
		Pace:      pace,
		Logf:      func(format string, args ...any) { c.logf(me+": "+format, args...) },
	}
	n, err := node.Open(c.ctx, cfg)
	if err != nil {
		return fmt.Errorf("%s: %w", me, err)
	}
	s.node = n
	s.loop.Post(func() {
		if err := n.Start(); err != nil {
			panic(fmt.Sprintf("%s: %v", me, err)) // nothing else has its address
		}
		s.coordinate()
	})
	return nil
}

// crash ends the process and its machine's power at once. It comes back after
// a while.
func (s *storage) crash() {
	c := s.c
	c.logf("%s crashes", nodeName(s.id))
	s.loop.Kill()
	s.loop, s.node = nil, nil
	c.Net.Crash(nodeName(s.id))
	s.crashDisk()
	pause := 50*time.Millisecond + time.Duration(c.World.Rand().Int64N(int64(3*time.Second)))
	c.World.At(c.World.Now().Add(pause), func() {
		c.logf("%s comes back", nodeName(s.id))
		if err := s.up(); err != nil {
			c.fail(err)
		}
	})
}

func (s *storage) running() bool { return s.node != nil }

// coordinate runs a candidate for coordinator beside the node, as production does.
func (s *storage) coordinate() {
	coordinator.New(coordinator.Config{Loop: s.loop, Store: s.c.Meta.Client(), Node: s.id, Deleter: noDeletes{s}}).Start(s.c.ctx)
}

// noDeletes answers that a deletion has to be tried again: the simulation
// deletes no volume yet.
type noDeletes struct{ s *storage }

// DeleteInGroup implements coordinator.Deleter.
func (n noDeletes) DeleteInGroup(_ context.Context, _ meta.VolumeMeta, _ block.GroupID, done func(error)) {
	n.s.loop.Post(func() { done(block.Errorf(block.Unsupported, "no deletions here")) })
}

// fail notes the first thing that is wrong; the run ends with it.
func (c *Cluster) fail(err error) {
	if c.failure == nil {
		c.failure = err
		c.logf("FAILED: %v", err)
	}
}
