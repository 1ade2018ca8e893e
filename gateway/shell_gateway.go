package gateway

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"firn.io/firn/internal/block"
	"firn.io/firn/internal/loop"
)

// DetachAfter is how long a volume stays attached after its last client left (F6).
const DetachAfter = 5 * time.Second

// Storage is what a Gateway needs of the cluster. All functions block and may
// be called by many goroutines at once.
type Storage struct {
	// Attach fences the volume for this gateway (F1).
	Attach func(ctx context.Context, id block.VolumeID) (Backend, error)
	// Find tells the geometry of the volume of that name or, if there is none, of
	// that UUID, attached or not.
	Find func(ctx context.Context, name string) (block.Geometry, error)
	// List tells the geometries of all volumes that can be attached, by name.
	List func(ctx context.Context) ([]block.Geometry, error)
}

// Options of a Gateway.
type Options struct {
	Loop    loop.Loop
	Storage Storage
	Limits  Limits
	// DetachAfter: see the constant, which is the default.
	DetachAfter time.Duration
	Log         *slog.Logger
}

// Gateway holds the volumes that are open here. It attaches a volume when its
// first client comes, once for however many come at once, and detaches it some
// time after the last has left, so that a client that reconnects finds its
// blocks still claimed by what was in flight (F6, W4).
type Gateway struct {
	opt Options

	mu     sync.Mutex
	open   map[block.VolumeID]*opened
	closed bool
	// refused are the volumes whose last attach failed, and the log knows why.
	refused map[block.VolumeID]string
}

// opened is a volume from before its Attach until after its Close.
type opened struct {
	id     block.VolumeID
	ready  chan struct{} // closed when volume or err is set
	volume *Volume
	err    error
	// gone is closed when the volume is no longer in Gateway.open.
	gone chan struct{}

	// Under Gateway.mu. An attach under way counts as a client.
	clients int
	left    uint64 // counts departures of the last client: which one a timer is for
	leaving bool
}

// New makes a gateway without open volumes.
func New(opt Options) *Gateway {
	if opt.DetachAfter == 0 {
		opt.DetachAfter = DetachAfter
	}
	if opt.Log == nil {
		opt.Log = slog.New(slog.DiscardHandler)
	}
	return &Gateway{opt: opt, open: map[block.VolumeID]*opened{}, refused: map[block.VolumeID]string{}}
}

// Handle is one client's use of an open volume.
type Handle struct {
	*Volume
	release func()
}

// Release ends the use. Calling it again does nothing.
func (h *Handle) Release() { h.release() }

// List tells what can be opened, sorted by name.
func (g *Gateway) List(ctx context.Context) ([]block.Geometry, error) {
	return g.opt.Storage.List(ctx)
}

// findTime bounds how long the metadata is asked for a volume that is open here:
// well below what a client waits for the answer to INFO.
const findTime = 300 * time.Millisecond

// Find tells what Open would give, without attaching: by the volume's name, or
// else by its UUID. A volume that is open here is found also while the cluster's
// metadata does not answer, and soon, so that its clients can reconnect (F4).
func (g *Gateway) Find(ctx context.Context, name string) (block.Geometry, error) {
	here, open := g.openAs(name)
	if !open {
		return g.opt.Storage.Find(ctx, name)
	}
	asking, cancel := context.WithTimeout(ctx, findTime)
	defer cancel()
	geometry, err := g.opt.Storage.Find(asking, name)
	switch {
	case err == nil || ctx.Err() != nil:
		return geometry, err
	case asking.Err() != nil || block.KindOf(err) == block.Unavailable:
		return here, nil
	}
	return geometry, err
}

// openAs finds a volume that is open here, by its last known name or its UUID.
func (g *Gateway) openAs(name string) (block.Geometry, bool) {
	for _, v := range g.Volumes() {
		if v.Geometry.Name == name || v.Geometry.ID.String() == name {
			return v.Geometry, true
		}
	}
	return block.Geometry{}, false
}

// Open attaches the volume of that name if it is not attached here, and returns
// a use of it. Kinds NotFound, Busy (another gateway has it; the text names it),
// Unavailable, Canceled.
func (g *Gateway) Open(ctx context.Context, name string) (*Handle, error) {
	geometry, err := g.Find(ctx, name)
	if err != nil {
		return nil, err
	}
	for {
		o, mine, err := g.enter(geometry.ID)
		if err != nil {
			return nil, err
		}
		if mine {
			go g.attach(o, geometry.Name)
		}
		h, again, err := g.join(ctx, o)
		if !again {
			return h, err
		}
	}
}

// enter finds or makes the entry of the volume and counts a client in. mine: the
// caller has to attach it.
func (g *Gateway) enter(id block.VolumeID) (o *opened, mine bool, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return nil, false, block.Errorf(block.Unavailable, "this gateway is stopping")
	}
	o, ok := g.open[id]
	if !ok {
		o = &opened{id: id, ready: make(chan struct{}), gone: make(chan struct{}), clients: 1}
		g.open[id] = o
	}
	o.clients++
	return o, !ok, nil
}

// join waits until o is attached. again: o was on its way out; try anew.
func (g *Gateway) join(ctx context.Context, o *opened) (h *Handle, again bool, err error) {
	select {
	case <-o.ready:
	case <-ctx.Done():
		g.leave(o)
		return nil, false, canceled(ctx)
	}
	if o.err != nil {
		g.leave(o)
		return nil, false, o.err
	}
	g.mu.Lock()
	leaving := o.leaving
	g.mu.Unlock()
	if !leaving && o.volume.over.Load() == nil {
		var once sync.Once
		return &Handle{Volume: o.volume, release: func() { once.Do(func() { g.leave(o) }) }}, false, nil
	}
	g.leave(o)
	select {
	case <-o.gone:
		return nil, true, nil
	case <-ctx.Done():
		return nil, false, canceled(ctx)
	}
}

// attachTime bounds an attempt to attach: it outlives a caller who gives up,
// since others may have joined.
const attachTime = 30 * time.Second

func (g *Gateway) attach(o *opened, name string) {
	ctx, cancel := context.WithTimeout(context.Background(), attachTime)
	defer cancel()
	backend, err := g.opt.Storage.Attach(ctx, o.id)
	g.tell(o.id, name, err)
	if err != nil {
		o.err = err
		g.remove(o)
		close(o.ready)
		g.leave(o)
		return
	}
	g.opt.Loop.Post(func() {
		o.volume = NewVolume(g.opt.Loop, backend, g.opt.Limits, func(err error) {
			g.opt.Log.Warn("attachment ended", "volume", o.volume.Geometry().Name, "why", err)
			g.remove(o)
		})
		close(o.ready)
		g.leave(o)
	})
}

// tell logs that a volume cannot be attached: once for a reason, until it can be.
func (g *Gateway) tell(id block.VolumeID, name string, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if err == nil {
		delete(g.refused, id)
		return
	}
	if why := err.Error(); g.refused[id] != why {
		g.refused[id] = why
		g.opt.Log.Warn("volume cannot be attached", "volume", name, "why", why)
	}
}

// remove takes o out of the table: the next client attaches anew.
func (g *Gateway) remove(o *opened) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.open[o.id] == o {
		delete(g.open, o.id)
		close(o.gone)
	}
}

// leave counts a client out. After the last one the volume is detached, if no
// other comes in time.
func (g *Gateway) leave(o *opened) {
	g.mu.Lock()
	defer g.mu.Unlock()
	o.clients--
	if o.clients > 0 || g.open[o.id] != o {
		return
	}
	o.left++
	left := o.left
	g.opt.Loop.Post(func() {
		g.opt.Loop.After(g.opt.DetachAfter, func() {
			if g.beginLeave(o, left) {
				o.volume.Detach(func(err error) { g.detached(o, err) })
			}
		})
	})
}

// beginLeave tells whether o is to be detached now: no client has come since
// the departure of that number.
func (g *Gateway) beginLeave(o *opened, left uint64) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if o.clients > 0 || o.left != left || o.leaving || g.open[o.id] != o || o.volume == nil {
		return false
	}
	o.leaving = true
	return true
}

func (g *Gateway) detached(o *opened, err error) {
	if err != nil {
		g.opt.Log.Warn("detach was not confirmed; the owner key ends with its lease", "volume", o.volume.Geometry().Name, "why", err)
	}
	g.remove(o)
}

// OpenVolume is a volume that is attached here.
type OpenVolume struct {
	Geometry block.Geometry
	Clients  int
	Stats    Stats
}

// Volumes tells what is attached here, in no order.
func (g *Gateway) Volumes() []OpenVolume {
	g.mu.Lock()
	defer g.mu.Unlock()
	var out []OpenVolume
	for _, o := range g.open {
		select {
		case <-o.ready:
			if o.volume != nil {
				out = append(out, OpenVolume{Geometry: o.volume.Geometry(), Clients: o.clients, Stats: o.volume.Stats()})
			}
		default:
		}
	}
	return out
}

// Detach ends the attachment of the volume here, clients or not; their
// operations fail with kind Canceled. Kind NotFound if it is not attached here,
// Busy if it has clients and force is not set.
func (g *Gateway) Detach(ctx context.Context, id block.VolumeID, force bool) error {
	g.mu.Lock()
	o := g.open[id]
	switch {
	case o == nil:
		g.mu.Unlock()
		return block.Errorf(block.NotFound, "volume %s is not attached here", id)
	case o.clients > 0 && !force:
		defer g.mu.Unlock()
		return block.Errorf(block.Busy, "volume %s has %d clients here; disconnect them or force it", id, o.clients)
	}
	// In the same critical section: no client comes between the look and the leave.
	// With clients an attach may be under way, and is waited for.
	begin := o.clients == 0 && o.beginDetach()
	g.mu.Unlock()
	select {
	case <-o.ready:
	case <-ctx.Done():
		if !begin {
			return canceled(ctx)
		}
	}
	if begin {
		g.depart(o)
		return g.awaitGone(ctx, o)
	}
	return g.detach(ctx, o)
}

// beginDetach makes o, which is not being attached, leave, under Gateway.mu. If it
// returns true the caller is to call depart.
func (o *opened) beginDetach() bool {
	begin := !o.leaving && o.volume != nil
	o.leaving = o.leaving || begin
	return begin
}

// depart detaches a volume that was made to leave.
func (g *Gateway) depart(o *opened) {
	g.opt.Loop.Post(func() { o.volume.Detach(func(err error) { g.detached(o, err) }) })
}

func (g *Gateway) detach(ctx context.Context, o *opened) error {
	g.mu.Lock()
	begin := g.open[o.id] == o && o.beginDetach()
	g.mu.Unlock()
	if begin {
		g.depart(o)
	}
	return g.awaitGone(ctx, o)
}

func (g *Gateway) awaitGone(ctx context.Context, o *opened) error {
	select {
	case <-o.gone:
		return nil
	case <-ctx.Done():
		return canceled(ctx)
	}
}

// Close refuses new clients and detaches everything. The frontends are closed
// before. After ctx ended, what is not detached ends with the lease.
func (g *Gateway) Close(ctx context.Context) error {
	g.mu.Lock()
	g.closed = true
	var all []*opened
	for _, o := range g.open {
		all = append(all, o)
	}
	g.mu.Unlock()
	// All at once: another gateway may wait for each of them.
	answers := make(chan error, len(all))
	for _, o := range all {
		go func() {
			select {
			case <-o.ready:
				answers <- g.detach(ctx, o)
			case <-ctx.Done():
				answers <- canceled(ctx)
			}
		}()
	}
	var err error
	for range all {
		err = first(err, <-answers)
	}
	return err
}
