// Package coordinator is the one elected process that gives volumes their
// groups, makes groups, and carries deletions out. Every storage node runs a
// candidate on its loop.
//
// A coordinator keeps nothing that it could not find again: all it does is to
// bring the catalog from the state that it is in one step further, and every
// step is one transaction. So it may crash anywhere; the next one goes on from
// what stands. What it plans on is a mirror of the catalog, which may be old;
// each transaction compares what it changes, and that the election key is still
// this coordinator's own (C2). One that was deposed without knowing it, because
// it was paused or cut off, changes nothing.
//
//	Creating --(groups missing)--> CreateGroups --(nodes acknowledge)--> spans, Ready
//	Ready, WantBytes above the spans --> the same, spans appended, still Ready
//	a replica lost, damaged, on a failed disk, or on a disk that its node lacks
//	or a node that is away for long
//	  --> a new replica ordered --(its group's leader)--> member in its place
//	the new one is gone too, or the old one is back before the new one is made
//	  --> given up --(its group's leader)--> as it was; the next order follows
//	Deleting --> CmdDelete in every group --> the volume's key removed
//
// Steps outside of the catalog (CmdDelete) are idempotent, and ordered only for
// volumes in state Deleting, which is never left but by removal.
package coordinator

import (
	"context"
	"log/slog"
	"time"

	"firn.io/firn/cluster/meta"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/loop"
)

// DefaultMaxGroupsPerDisk bounds the replicas of a disk.
const DefaultMaxGroupsPerDisk = 100

// DefaultAbsentAfter is how long a disk that its node came up without is waited for.
const DefaultAbsentAfter = time.Minute

const (
	// retryDelay is the pause after a step that failed.
	retryDelay = 500 * time.Millisecond
	// hintPatience is how long a step waits for the mirrors to tell what it did.
	hintPatience = 2 * time.Second
	// relistEvery is the safety net below the watches.
	relistEvery = 5 * time.Minute
	// maxDeletes bounds the groups that are told of deletions at once.
	maxDeletes = 16
)

// Deleter makes a volume a tombstone in its groups. The node or command that
// runs the coordinator supplies it, over cluster.Client.
type Deleter interface {
	// DeleteInGroup proposes CmdDelete of the volume, at v.Epoch, in group g. It
	// is called on the coordinator's loop; done is called on that loop, once, when
	// apply has answered or with an error after which it is tried again. ctx
	// ends when the coordinator stops or is deposed.
	DeleteInGroup(ctx context.Context, v meta.VolumeMeta, g block.GroupID, done func(error))
}

// Config is what a coordinator is made of.
type Config struct {
	Loop  loop.Loop
	Store meta.Store
	// Node is where this candidate runs.
	Node    block.NodeID
	Deleter Deleter
	// MaxGroupsPerDisk bounds how many replicas a disk gets; 0 is DefaultMaxGroupsPerDisk.
	MaxGroupsPerDisk int
	// AbsentAfter is how long a disk may be missing on a node that is up before
	// its replicas are replaced, and how long a node may be away before a replica
	// there that is no member yet is made elsewhere; 0 is DefaultAbsentAfter.
	AbsentAfter time.Duration
	// ReplaceAfter is how long a node may be away before its replicas are
	// replaced; 0: for ever, it is expected back.
	ReplaceAfter time.Duration
	// Log may be nil.
	Log *slog.Logger
}

// Coordinator is a candidate, and while it is elected, the coordinator. All
// methods are called on the loop.
type Coordinator struct {
	cfg     Config
	ctx     context.Context // from Start to Stop
	cancel  context.CancelFunc
	session *meta.Session
	// election follows the election key, to campaign as soon as it is gone.
	election    *meta.Mirror
	nonce       uint64 // of the campaign that is going on
	campaigning bool
	timer       uint64 // the latest that campaignIn has set
	stopped     bool

	lead *leadership // nil while another, or none, is elected

	ordered, givenUp uint64
}

// Status is a snapshot of a candidate.
type Status struct {
	// Leading: see Coordinator.Leading. Groups and Degraded are known only then.
	Leading bool
	// Groups is how many there are; Degraded of them lack a replica that is well,
	// or are being repaired.
	Groups, Degraded int
	// Ordered and GivenUp count replacements that this candidate asked the store
	// for since it began.
	Ordered, GivenUp uint64
}

// Status returns a snapshot.
func (c *Coordinator) Status() Status {
	s := Status{Leading: c.Leading(), Ordered: c.ordered, GivenUp: c.givenUp}
	if c.lead != nil {
		s.Groups = len(c.lead.view.groups)
		for _, g := range c.lead.view.groups {
			if !g.Whole() {
				s.Degraded++
			}
		}
	}
	return s
}

// New makes a candidate; Start begins it.
func New(cfg Config) *Coordinator {
	if cfg.MaxGroupsPerDisk == 0 {
		cfg.MaxGroupsPerDisk = DefaultMaxGroupsPerDisk
	}
	if cfg.AbsentAfter == 0 {
		cfg.AbsentAfter = DefaultAbsentAfter
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	c := &Coordinator{cfg: cfg}
	c.session = meta.NewSession(cfg.Loop, cfg.Store, meta.NodeTTL, func(meta.LeaseID) { c.campaign() }, c.depose)
	c.election = meta.NewMirror(cfg.Loop, cfg.Store, meta.ElectionKey, func(kv meta.KV) {
		if !kv.Exists() {
			c.campaign()
		}
	}, nil)
	return c
}

// Start begins to campaign. ctx bounds all that the coordinator does.
func (c *Coordinator) Start(ctx context.Context) {
	c.ctx, c.cancel = context.WithCancel(ctx)
	c.session.Start(c.ctx)
	c.election.Start(c.ctx)
}

// Leading tells whether this candidate believes that it is elected. It is for
// people and tests: others may be elected at the same time.
func (c *Coordinator) Leading() bool { return c.lead != nil }

// Stop ends the candidacy and frees the election for others at once. done is
// called when the store has answered, or could not.
func (c *Coordinator) Stop(done func()) {
	if c.stopped {
		c.cfg.Loop.Post(done)
		return
	}
	c.stopped = true
	c.depose()
	if c.ctx == nil {
		c.cfg.Loop.Post(done)
		return
	}
	c.election.Stop()
	// Revoking the lease removes the election key.
	c.session.Stop(func(error) {
		c.cancel()
		done()
	})
}

// campaign tries to be elected, once; again after errors, when the key of the
// one who is vanishes, and after a while, since a watch may be late.
func (c *Coordinator) campaign() {
	lease := c.session.Lease()
	if c.stopped || c.campaigning || c.lead != nil || lease == 0 {
		return
	}
	c.campaigning = true
	if c.nonce == 0 {
		c.nonce = c.cfg.Loop.Rand().Uint64() | 1
	}
	nonce := c.nonce
	var guard meta.Guard
	var won bool
	var err error
	c.cfg.Loop.Do(loop.Meta, func() {
		guard, won, err = meta.Campaign(c.ctx, c.cfg.Store, c.cfg.Node, nonce, lease)
	}, func() {
		c.campaigning = false
		switch {
		case c.stopped:
		case c.session.Lease() != lease:
			c.campaign()
		case err != nil:
			c.campaignIn(retryDelay)
		case won:
			c.nonce = 0
			c.lead = newLeadership(c, guard)
			c.lead.start()
		default:
			c.campaignIn(meta.NodeTTL)
		}
	})
}

// campaignIn campaigns after d, in the place of any later campaign that was set
// before: one timer goes on, however many campaigns are lost.
func (c *Coordinator) campaignIn(d time.Duration) {
	c.timer++
	timer := c.timer
	c.cfg.Loop.After(d, func() {
		if timer == c.timer {
			c.campaign()
		}
	})
}

// depose ends a leadership, whatever of it is still under way. It does not
// touch the election key, which may be another's.
func (c *Coordinator) depose() {
	if c.lead == nil {
		return
	}
	c.lead.stop()
	c.lead = nil
	if !c.stopped {
		c.campaignIn(retryDelay)
	}
}
