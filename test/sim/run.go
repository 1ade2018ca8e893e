package sim

import (
	"cmp"
	"crypto/rand"
	"fmt"
	"io"
	randv2 "math/rand/v2"
	"sort"
	"strings"
	"sync"
	"time"

	"firn.io/firn/cluster/meta"
	"firn.io/firn/internal/block"
	"firn.io/firn/test/stamp"
)

const (
	attachPause = 200 * time.Millisecond
	// fillPause bounds the operations per second, and with them the time that a
	// seed takes.
	fillPause = 3 * time.Millisecond
)

// Report is what a run has shown.
type Report struct {
	Seed uint64
	// Trace is a hash of the instants of all events and of all that operations
	// did: equal seeds have equal ones.
	Trace  uint64
	Events uint64
	// Virtual is how long the run took in virtual time.
	Virtual time.Duration
	// Recovery is the time from the end of all faults until every operation in
	// flight had its answer, Stall the longest time that an operation took.
	Recovery, Stall time.Duration
	Faults          map[string]int
	Operations      uint64
	Failed          uint64 // of them, for a reason that faults excuse
	Acked, Unknown  uint64
	Checked         uint64 // sectors judged
	Ordered         int    // operations that porcupine found an order of
	Digests         int    // comparisons of replicas at equal applied indexes
	Read            int64  // blocks of all replicas, at the end
	Live, Readable  int64  // blocks, over all nodes, at the end
	// Resizes and Deleted volumes beside the load, Repeated batches of requests.
	Resizes, Deleted, Repeated int
	// Replaced is how many replicas were ordered in the place of others.
	Replaced int
	// Survivors read all once more after a total power cut, without one node.
	Survivors bool
}

func (r Report) String() string {
	var faults []string
	for what, n := range r.Faults {
		faults = append(faults, fmt.Sprintf("%d %s", n, what))
	}
	sort.Strings(faults)
	return fmt.Sprintf("seed %d: %d events in %v of virtual time, trace %016x\n"+
		"  faults: %s\n"+
		"  %d operations, %d of them failed, %d writes acknowledged, %d of unknown outcome, %d sectors judged, %d operations ordered, %d digests compared\n"+
		"  %d resizes, %d volumes deleted, %d batches repeated, %d replicas ordered anew; longest stall %v; after the faults all operations were answered within %v\n"+
		"  %d blocks live, %d readable, %d read on each replica; all read again without a minority: %v",
		r.Seed, r.Events, r.Virtual, r.Trace, strings.Join(faults, ", "), r.Operations, r.Failed, r.Acked, r.Unknown, r.Checked, r.Ordered, r.Digests,
		r.Resizes, r.Deleted, r.Repeated, r.Replaced, r.Stall, r.Recovery, r.Live, r.Readable, r.Read, r.Survivors)
}

// entropy makes crypto/rand.Reader, which the Raft library draws its election
// time-outs from, repeat with the seed. One run at a time may hold it.
var entropy sync.Mutex

type seeded struct{ *randv2.ChaCha8 }

func holdEntropy(seed uint64) (release func()) {
	entropy.Lock()
	was := rand.Reader
	var key [32]byte
	for i := range 8 {
		key[i] = byte(seed >> (8 * i))
	}
	rand.Reader = io.Reader(seeded{randv2.NewChaCha8(key)})
	return func() {
		rand.Reader = was
		entropy.Unlock()
	}
}

// limits of a run, in virtual time.
const (
	readyLimit    = 30 * time.Second
	recoveryLimit = 60 * time.Second
	settleLimit   = 60 * time.Second
)

// Run runs one seed to its end.
func Run(opt Options) (Report, error) {
	defer holdEntropy(opt.Seed)()
	c := newCluster(opt)
	r := Report{Seed: opt.Seed, Faults: map[string]int{}}
	err := c.run(&r)
	if c.failure != nil {
		err = c.failure // what the run ended with is its consequence
	}
	r.Events, r.Virtual = c.events, c.since(c.World.Now())
	return r, err
}

func (c *Cluster) run(r *Report) error {
	load, err := c.boot()
	if err != nil {
		return err
	}
	w := load.w
	f := &faults{c: c, counts: r.Faults}
	z, h := &resizer{c: c, w: w}, &churner{c: c}
	defer func() {
		r.Operations, r.Failed, r.Stall = w.ended, w.failed, w.stall
		r.Acked, r.Unknown, r.Checked = w.history.Counts()
		r.Trace = c.trace.Sum64() ^ w.trace.h
		r.Resizes, r.Deleted, r.Repeated = z.done, h.deleted, c.Net.Repeated()
		for _, g := range c.groupsNow() {
			r.Replaced += max(0, int(g.LastReplica)-len(g.Replicas))
		}
	}()
	if !c.opt.Plain {
		f.begin()
		z.later()
		h.poll()
	}
	end := c.World.Now().Add(c.opt.Duration)
	c.runUntil(c.opt.Duration, func() bool { return w.fault != nil || h.fault != nil || c.World.Now() >= end })

	f.heal()
	healed := c.World.Now()
	load.stop()
	z.stopped, h.stopped = true, true
	answered := func() bool {
		return w.fault != nil || c.attached() != nil && len(w.inFlight) == 0 && h.step == churnCreate
	}
	if !c.runUntil(recoveryLimit, answered) {
		return fmt.Errorf("progress: %v after all faults ended, %d operations have no answer (volume attached: %v, the churn's step: %d)\n%s",
			recoveryLimit, len(w.inFlight), c.attached() != nil, h.step, c.state())
	}
	r.Recovery = c.World.Now().Sub(healed)
	if err := cmp.Or(w.fault, h.fault, c.verify(w)); err != nil {
		return err
	}
	if err := c.compare(r); err != nil {
		return err
	}
	if err := c.finale(w); err != nil {
		return err
	}
	r.Survivors = true
	r.Ordered, err = w.linear.check(largestVolume / stamp.SectorBytes)
	return err
}

// boot starts all processes, creates the volume and keeps it loaded.
func (c *Cluster) boot() (*load, error) {
	for i := range c.opt.Nodes {
		if err := c.addNode(block.NodeID(i + 1)).up(); err != nil {
			return nil, err
		}
	}
	c.victim = c.nodes[c.World.Rand().IntN(len(c.nodes))]
	if err := c.createVolume(); err != nil {
		return nil, err
	}
	l := &load{c: c, w: newWorkload(c, c.volume.ID)}
	for _, name := range []string{"gateway1", "gateway2"} {
		c.addSeat(name, l.up, l.w.abandon).start()
	}
	c.want(c.seats[0])
	if !c.runUntil(readyLimit, func() bool { return c.attached() != nil }) {
		return nil, fmt.Errorf("the volume is not attached within %v", readyLimit)
	}
	return l, nil
}

// verify reads the whole volume, through whichever attachment stands.
func (c *Cluster) verify(w *workload) error {
	verified := false
	var by *attachment
	c.runUntil(recoveryLimit, func() bool {
		if a := c.attached(); a != nil && a != by {
			by = a
			a.loop.Post(func() { w.verify(a, func() { verified = !a.over }) })
		}
		return verified || w.fault != nil
	})
	if w.fault == nil && !verified {
		return fmt.Errorf("progress: the volume cannot be read to its end within %v\n%s", recoveryLimit, c.state())
	}
	return w.fault
}

// finale cuts the power of all nodes, lets all but one come back, and reads
// everything again: what was acknowledged is on any majority.
func (c *Cluster) finale(w *workload) error {
	for _, s := range c.nodes {
		s.broken = s == c.victim
		s.ifUp(s.crash)
	}
	c.logf("the power of all nodes was cut, and %s is lost", nodeName(c.victim.id))
	c.runFor(100 * time.Millisecond)
	return c.verify(w)
}

// createVolume waits for nodes and creates the volume under load.
func (c *Cluster) createVolume() (err error) {
	id, store := block.VolumeID(c.uuid()), c.Meta.Client()
	ready := func() bool {
		if c.volume.ID.IsZero() {
			c.volume, err = meta.CreateVolume(c.ctx, store, meta.NewVolume{ID: id, Name: "demo", SizeBytes: c.opt.VolumeBytes,
				Replicas: cmp.Or(c.opt.Replicas, c.opt.Nodes)})
			return false
		}
		c.volume, err = meta.GetVolume(c.ctx, store, id)
		return err == nil && c.volume.State == meta.Ready
	}
	for range int(readyLimit / attachPause) {
		if c.runFor(attachPause); ready() {
			return nil
		}
	}
	return fmt.Errorf("the volume is not ready within %v (state %s, %s): %w", readyLimit, c.volume.State, c.volume.Waiting, err)
}

// load keeps operations in flight on every attachment, also on one that another
// gateway has taken the volume from and that does not know it.
type load struct {
	c       *Cluster
	w       *workload
	stopped bool
}

// up begins to work on a new attachment.
func (l *load) up(a *attachment) {
	l.w.exported(a)
	l.fill(a)
}

// fill tops up what is in flight, again and again.
func (l *load) fill(a *attachment) {
	if l.stopped || a.over || l.w.fault != nil {
		return
	}
	for n := l.w.inFlightOf(a); n < l.c.opt.Writers; n++ {
		l.w.step(a)
	}
	a.loop.After(cmp.Or(l.c.opt.Pause, fillPause), func() { l.fill(a) })
}

func (l *load) stop() { l.stopped = true }
