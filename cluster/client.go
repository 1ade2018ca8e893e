// Package cluster is all that a gateway sees of the cluster: a Client finds
// volumes, groups and their leaders, attaches volumes for this process, and
// brings each operation to a definite end, however often nodes, connections and
// leaders change meanwhile.
//
// Client is a single-threaded core: it is called on its Loop, and tells what
// became of something by calling back on it. Nothing here blocks.
//
// How the parts fit:
//
//	Attachment  one attached volume: splits nothing, numbers everything (a gateway.Backend)
//	stream      the content operations of one (volume, group, epoch): opSeq, floor, window, token
//	operation   one command on its way to the answer of apply
//	query       one read, map or record request on its way to an answer of any replica that may give it
//	group       where a group's replicas are, and which leads as far as known
//	conn, call  one connection to a node, one request on it
package cluster

import (
	"context"
	"log/slog"
	"slices"
	"time"

	"firn.io/firn/cluster/meta"
	"firn.io/firn/cluster/transport"
	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/clock"
	"firn.io/firn/internal/loop"
	"firn.io/firn/internal/payload"
)

// How long what may take. A node that answers other requests is alive: then a
// request is given longer, since a retry would only add to its load.
const (
	// tickEvery is how often time-outs and retries are looked at.
	tickEvery = 50 * time.Millisecond
	// silentCommand ends the wait for an answer to a command when nothing at all
	// came from that node for so long.
	silentCommand = time.Second
	// slowCommand ends it in any case: an answer can be lost on a connection that
	// stands. It doubles with each attempt that was lost, up to slowestCommand,
	// since the node may just be slow, and then each attempt adds to its work.
	slowCommand    = 2 * time.Second
	slowestCommand = 10 * time.Second
	// slowRead ends the wait for the first replica that was asked; it doubles
	// with each round up to slowestRead.
	slowRead    = 300 * time.Millisecond
	slowestRead = 2 * time.Second
	// metaRetry is the pause before a metadata call that failed is made again.
	metaRetry = 300 * time.Millisecond
	// relistEvery is how often the groups are listed again while one that is
	// needed is not known.
	relistEvery = time.Second
)

// Config says what a Client works with.
type Config struct {
	Loop    loop.Loop
	Store   meta.Store
	Network transport.Network
	Cluster block.ClusterID
	// Gateway is who attaches volumes. Boot and Folder in it are the proof of F3:
	// set them only while the folder's lock is held. With an empty ID the client
	// attaches nothing: a node's, for DeleteInGroup.
	Gateway meta.GatewayMeta
	// OwnerAddr is where the gateway's clients go, for error texts on other
	// gateways; Gateway.Addr if empty.
	OwnerAddr string
	Log       *slog.Logger
}

// Client is one process's view of the cluster.
type Client struct {
	cfg  Config
	loop loop.Loop
	log  *slog.Logger

	ctx     context.Context // of Start: bounds calls of the metadata store
	cancel  context.CancelFunc
	session *meta.Session
	lease   meta.LeaseID // that the gateway is registered under
	// unregistered is why it is not, as the log was told.
	unregistered string
	nodes        *meta.Mirror
	groupsM      *meta.Mirror
	volumes      *meta.Mirror
	owners       *meta.Mirror
	// ownKeys are the owner keys under this process's lease that owners has.
	ownKeys   map[block.VolumeID]block.Nonce
	releasing bool // one of them that no attachment here has

	conns  map[block.NodeID]*conn
	groups map[block.GroupID]*group
	// order has the groups in the order in which they became known, so that
	// nothing depends on the order of a map.
	order []*group

	lastID  uint64
	calls   map[uint64]*call
	first   *call // of calls, in the order they were sent
	last    *call
	delayed []*query // to be sent again at the next tick, each once
	round   uint64   // of tick
	ticking bool
	relist  clock.Instant

	attachments map[block.VolumeID]*Attachment
	attaching   map[block.VolumeID]*attaching
	attached    []*Attachment   // in order of attaching
	resp        wire.Response   // used again for each response
	pieces      []payload.Piece // used again for each read
	freeOps     []*operation
	freeQueries []*query

	counters Counters
}

// Counters count since the start.
type Counters struct {
	// Commands and Queries were sent, retries included.
	Commands, Queries uint64
	// CommandRetries and QueryRetries are those of them that were not the first
	// attempt; of queries most of them asked another replica.
	CommandRetries, QueryRetries uint64
	// Lost calls had no answer; their effect was unknown then.
	Lost uint64
	// Redirects are answers that named another leader, or none.
	Redirects uint64
	// NotReady answers came from nodes that cannot serve the group now, or not
	// yet as far as the token says.
	NotReady uint64
	// Busy answers refused a command for the leader's queue was full.
	Busy uint64
	// Dropped commands were proposed, and may or may not be committed.
	Dropped uint64
	// StaleLayouts are answers that knew a newer layout of the volume.
	StaleLayouts uint64
	// Fenced answers and outcomes denied this process's epoch or the volume.
	Fenced uint64
	// NoSpace answers refused a write for want of room.
	NoSpace uint64
	// BadReads are answers whose bytes did not match their checksums.
	BadReads uint64
	// Corrupt answers came from nodes whose copy, or what reached them, was damaged.
	Corrupt uint64
	// Stray messages were answers to nobody, or did not decode.
	Stray uint64
}

// answered counts a status of an answer that is not the one hoped for.
func (c *Counters) answered(s wire.Status) {
	switch s {
	case wire.StatusNotLeader:
		c.Redirects++
	case wire.StatusUnknownGroup, wire.StatusNotReady:
		c.NotReady++
	case wire.StatusBusy:
		c.Busy++
	case wire.StatusDropped:
		c.Dropped++
	case wire.StatusStaleLayout:
		c.StaleLayouts++
	case wire.StatusFenced, wire.StatusNoVolume:
		c.Fenced++
	case wire.StatusNoSpace:
		c.NoSpace++
	case wire.StatusCorrupt:
		c.Corrupt++
	}
}

// New makes a client; Start begins it.
func New(cfg Config) *Client {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.OwnerAddr == "" {
		cfg.OwnerAddr = cfg.Gateway.Addr
	}
	c := &Client{cfg: cfg, loop: cfg.Loop, log: cfg.Log, conns: map[block.NodeID]*conn{}, groups: map[block.GroupID]*group{},
		calls: map[uint64]*call{}, attachments: map[block.VolumeID]*Attachment{},
		attaching: map[block.VolumeID]*attaching{}, ownKeys: map[block.VolumeID]block.Nonce{}}
	c.nodes = meta.NewMirror(c.loop, cfg.Store, meta.NodesPrefix, c.nodeChanged, nil)
	c.groupsM = meta.NewMirror(c.loop, cfg.Store, meta.GroupsPrefix, c.groupChanged, nil)
	if cfg.Gateway.ID != "" {
		c.volumes = meta.NewMirror(c.loop, cfg.Store, meta.VolumesPrefix, c.volumeChanged, nil)
		c.owners = meta.NewMirror(c.loop, cfg.Store, meta.OwnersPrefix, c.ownerChanged, c.releaseStale)
		c.session = meta.NewSession(c.loop, cfg.Store, meta.OwnerTTL, c.granted, nil)
	}
	return c
}

// Start begins to follow the metadata and, with a gateway id, to hold a lease.
// It is called on the loop. ctx bounds all calls of the metadata store.
func (c *Client) Start(ctx context.Context) {
	c.ctx, c.cancel = context.WithCancel(ctx)
	c.nodes.Start(c.ctx)
	c.groupsM.Start(c.ctx)
	if c.session != nil {
		c.volumes.Start(c.ctx)
		c.owners.Start(c.ctx)
		c.session.Start(c.ctx)
	}
}

// Stop ends every attachment (what is in flight fails with kind Canceled),
// gives the lease back and closes the connections. It is called on the loop; done
// is called when the metadata store has answered, or after an error, with which
// owner keys end by themselves.
func (c *Client) Stop(done func(error)) {
	left, err := 1, error(nil)
	part := func(e error) {
		left--
		if err == nil {
			err = e
		}
		if left == 0 {
			c.shut()
			done(err)
		}
	}
	for _, a := range slices.Clone(c.attached) {
		left++
		a.Close(part)
	}
	c.nodes.Stop()
	c.groupsM.Stop()
	if c.session == nil {
		part(nil)
		return
	}
	c.volumes.Stop()
	c.owners.Stop()
	c.session.Stop(part)
}

func (c *Client) shut() {
	c.cancel()
	for _, cn := range c.conns {
		cn.peer.Close()
	}
	clear(c.conns)
}

// Counters returns what was counted, on the loop.
func (c *Client) Counters() Counters { return c.counters }

// Attached tells the volumes that are attached here, on the loop.
func (c *Client) Attached() []*Attachment { return slices.Clone(c.attached) }

// granted runs when the gateway has a new lease: whatever hung on the old one is
// written again.
func (c *Client) granted(id meta.LeaseID) {
	var err error
	ctx, g := c.ctx, c.cfg.Gateway
	c.loop.Do(loop.Meta, func() { err = meta.RegisterGateway(ctx, c.cfg.Store, g, id) }, func() {
		switch {
		case c.session.Lease() != id || ctx.Err() != nil:
		case err != nil:
			if why := err.Error(); why != c.unregistered {
				c.unregistered = why
				c.log.Warn("gateway is not registered; it tries on", "id", g.ID, "why", why)
			}
			c.loop.After(metaRetry, func() {
				if c.session.Lease() == id {
					c.granted(id)
				}
			})
		default:
			c.lease, c.unregistered = id, ""
			for _, a := range slices.Clone(c.attached) {
				a.checkOwner()
			}
		}
	})
}

// leased returns the lease that owner keys can be written under; 0 for none.
func (c *Client) leased() meta.LeaseID {
	if c.session == nil || c.session.Lease() != c.lease || !c.session.Valid() {
		return 0
	}
	return c.lease
}

func (c *Client) volumeChanged(kv meta.KV) {
	id, err := meta.ParseVolumeKey(kv.Key)
	if err != nil || !kv.Exists() {
		return
	}
	a := c.attachments[id]
	if a == nil {
		return
	}
	if v, err := meta.DecodeVolume(kv); err == nil {
		a.refreshed(v)
	}
}

// armTick makes sure that tick runs.
func (c *Client) armTick() {
	if c.ticking {
		return
	}
	c.ticking = true
	c.loop.After(tickEvery, c.tick)
}

// tick ends calls whose time is over and sends again what was held back. It
// runs while there is something to look after.
func (c *Client) tick() {
	c.ticking = false
	if c.ctx.Err() != nil {
		return
	}
	c.expireCalls()
	unknown, busy := false, false
	for _, g := range c.order {
		if len(g.retry) > 0 || len(g.refused) > 0 {
			g.tick()
		}
		unknown = unknown || len(g.replicas) == 0 && len(g.retry) > 0
		busy = busy || len(g.retry) > 0
	}
	// What is sent may end other queries, and those be used again and delayed
	// anew: only c.delayed itself says who waits, and since when.
	c.round++
	for len(c.delayed) > 0 && c.delayed[0].round < c.round {
		q := c.delayed[0]
		c.delayed = slices.Delete(c.delayed, 0, 1)
		unknown = unknown || len(q.group.replicas) == 0
		q.send()
	}
	if unknown && c.loop.Now().Sub(c.relist) > relistEvery {
		c.relist = c.loop.Now()
		c.groupsM.Relist()
	}
	if busy || len(c.calls) > 0 || len(c.delayed) > 0 {
		c.armTick()
	}
}
