package attach

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"time"

	"firn.io/firn/internal/block"
	"firn.io/firn/nbd/client"
	"firn.io/firn/nbd/wire"
)

// Run keeps the device connected until ctx ends or the device is disconnected
// by somebody; the latter is nil.
func (d *Device) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	w, err := newWatch(d)
	if err != nil {
		cancel()
		return err
	}
	defer w.close()
	defer cancel()
	d.calls.Go(func() { d.probe(ctx) })
	d.changed()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case index := <-d.kernel.Dead():
			if !d.linkDead(index) {
				continue
			}
		case <-d.hurt:
		}
		if !d.kernel.Connected(d.Status().Index) {
			d.cfg.Log.Info("device was disconnected", "device", d.Path())
			return nil
		}
		d.refresh()
		err := d.restore(ctx, w.wake)
		switch {
		case errors.Is(err, errDisconnected):
			d.cfg.Log.Info("device was disconnected", "device", d.Path())
			return nil
		case err != nil:
			return err
		}
	}
}

// linkDead notes what the kernel says of a device. Of sockets that this process
// has not made it is all that tells of their end.
func (d *Device) linkDead(index int) (ours bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if index != d.status.Index {
		return false
	}
	for i := range d.slots {
		if s := &d.slots[i]; !s.dead && s.fd < 0 {
			s.dead = true
			break
		}
	}
	return true
}

// errDisconnected ends a device that somebody disconnected.
var errDisconnected = errors.New("the device was disconnected")

// hurts makes Run look after the connections.
func (d *Device) hurts() {
	select {
	case d.hurt <- struct{}{}:
	default:
	}
}

// refresh looks which sockets are dead, and counts.
func (d *Device) refresh() {
	d.mu.Lock()
	defer d.mu.Unlock()
	live := 0
	for i := range d.slots {
		s := &d.slots[i]
		if !s.dead && gone(s.fd) {
			s.dead = true
		}
		if s.dead {
			s.release()
		} else {
			live++
		}
	}
	if d.status.Live > 0 && live == 0 {
		d.downSince = d.cfg.Clock.Now()
	}
	if live < d.status.Live {
		d.cfg.Log.Warn("connections lost", "volume", d.cfg.Export, "gateway", d.status.Gateway, "live", live, "of", len(d.slots))
	}
	d.status.Live = live
}

// restore makes connections for those that are dead until none is.
func (d *Device) restore(ctx context.Context, added func()) error {
	pause, began, said := minPause, d.cfg.Clock.Now(), ""
	for {
		dead := d.firstDead()
		if dead < 0 {
			return nil
		}
		d.holdBack()
		err := d.restoreOne(ctx, dead)
		if err == nil {
			pause, began = minPause, d.cfg.Clock.Now()
			added()
			continue
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if !d.kernel.Connected(d.Status().Index) {
			return errDisconnected
		}
		if text := err.Error(); text != said {
			d.cfg.Log.Warn("no new connection; trying on", "volume", d.cfg.Export, "err", err)
			d.problem(text)
			said = text
		}
		if d.Status().Live > 0 && d.cfg.Clock.Now().Sub(began) > partialTime {
			d.shutAll()
		}
		timer := time.NewTimer(pause)
		select {
		case <-ctx.Done():
		case <-timer.C:
		}
		timer.Stop()
		pause = min(2*pause, maxPause)
		d.refresh()
	}
}

// holdBack makes the kernel take back what is in flight. Should that fail, it is
// tried again with the next connection.
func (d *Device) holdBack() {
	if d.cfg.RequestTime != 0 || d.lost {
		return
	}
	s := d.Status()
	if err := d.kernel.Lost(s.Index, s.Backend); err != nil {
		d.cfg.Log.Warn("requests in flight are not taken back yet", "device", d.Path(), "err", err)
		return
	}
	d.lost = true
}

// goOn ends holdBack: requests wait again as long as their connection lives. Should
// that fail, a request that takes seconds costs the connection, and the next one
// is tried with.
func (d *Device) goOn(fd int) {
	if d.cfg.RequestTime != 0 {
		return
	}
	d.lost = false
	s := d.Status()
	if err := d.kernel.Restored(s.Index, s.Backend, fd); err != nil {
		d.cfg.Log.Warn("requests do not wait as long as their connection lives", "device", d.Path(), "err", err)
	}
	d.calls.Go(func() {
		if err := d.kernel.Watch(s.Index); err != nil {
			d.cfg.Log.Warn("requests in flight are repeated late when the connection breaks", "device", devicePath(s.Index), "err", err)
		}
	})
}

func (d *Device) problem(text string) {
	d.mu.Lock()
	d.status.Problem = text
	d.mu.Unlock()
	d.changed()
}

func (d *Device) firstDead() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i := range d.slots {
		if d.slots[i].dead {
			return i
		}
	}
	return -1
}

// restoreOne gives the dead slot i a new connection: at the server of the
// others, or if there are none at any, in a new incarnation.
func (d *Device) restoreOne(ctx context.Context, i int) error {
	before := d.Status()
	var fd int
	var export client.Export
	var err error
	if before.Live == 0 {
		fd, export, err = d.dialAny(ctx)
	} else {
		fd, export, err = d.enter(ctx, before.Gateway, uint32(i))
	}
	if err != nil {
		return err
	}
	if backend := backendOf(export, d.cfg); backend != before.Backend {
		shut(fd)
		return block.Errorf(block.NotFound, "%s at %s is another volume now: %s, not %s", d.cfg.Export, d.Status().Gateway, backend, before.Backend)
	}
	err = d.hand(ctx, i, fd, before)
	if errors.Is(err, errNoUse) && d.adopted && !export.Session {
		// The older process' connection lives, and this server cannot end it.
		shut(fd)
		d.goOn(-1)
		d.taken(i, -1, before)
		return nil
	}
	if err != nil {
		shut(fd)
	}
	return err
}

var errNoUse = errors.New("the kernel has no use for a new connection")

// hand gives fd to the kernel for slot i. The kernel drops a socket silently as
// long as it has not seen one of its own die, so it is given until it is taken.
func (d *Device) hand(ctx context.Context, i, fd int, before Status) error {
	ctx, cancel := context.WithTimeout(ctx, takeTime)
	defer cancel()
	for {
		taken, err := d.kernel.Reconnect(before.Index, before.Backend, fd)
		if err != nil {
			return err
		}
		if taken {
			d.goOn(fd)
			d.taken(i, fd, before)
			return nil
		}
		timer := time.NewTimer(20 * time.Millisecond)
		select {
		case <-ctx.Done():
			timer.Stop()
			return fmt.Errorf("%w: %w", errNoUse, ctx.Err())
		case <-d.kernel.Dead():
		case <-timer.C:
		}
		timer.Stop()
	}
}

func (d *Device) taken(i, fd int, before Status) {
	d.mu.Lock()
	d.slots[i] = slot{fd: fd}
	d.status.Live++
	d.status.Reconnects++
	if before.Gateway != d.status.Gateway {
		d.status.Moves++
	}
	if d.status.Live == 1 && d.downSince != 0 {
		down := d.cfg.Clock.Now().Sub(d.downSince)
		d.downSince = 0
		d.status.DownMillis += down.Milliseconds()
		d.status.LongestMillis = max(d.status.LongestMillis, down.Milliseconds())
		d.cfg.Log.Info("connected again", "volume", d.cfg.Export, "gateway", d.status.Gateway, "without", down)
	}
	if d.status.Live == len(d.slots) {
		d.status.Problem = ""
	}
	d.mu.Unlock()
	d.changed()
}

// dialAny enters the export at the first gateway that lets it, beginning with
// the one in use, as connection 0 of a new incarnation.
func (d *Device) dialAny(ctx context.Context) (int, client.Export, error) {
	d.mu.Lock()
	first := cmp.Or(d.next, d.status.Gateway)
	now := uint64(d.cfg.Clock.Now())
	d.status.Incarnation = max(d.status.Incarnation+1, now)
	d.mu.Unlock()
	d.changed()
	var errs []error
	for _, addr := range order(d.cfg.Gateways, first) {
		fd, export, err := d.tryGateway(ctx, addr)
		if err == nil {
			d.mu.Lock()
			d.status.Gateway, d.next = addr, ""
			d.mu.Unlock()
			return fd, export, nil
		}
		errs = append(errs, fmt.Errorf("gateway %s: %w", addr, err))
		if ctx.Err() != nil {
			break
		}
	}
	kind := block.NotFound
	for _, err := range errs {
		var refused *client.OptionError
		if !errors.As(err, &refused) || refused.Reply != wire.RepErrUnknown {
			kind = block.Unavailable
		}
	}
	return -1, client.Export{}, block.Wrap(kind, errors.Join(errs...), "no gateway lets %s in", d.cfg.Export)
}

// tryGateway first asks whether the server is there at all, which is quickly
// known, for entering an export may take its time.
func (d *Device) tryGateway(ctx context.Context, addr string) (int, client.Export, error) {
	if _, err := d.info(ctx, addr); err != nil {
		return -1, client.Export{}, err
	}
	return d.enter(ctx, addr, 0)
}

// info asks for the export: by its name or, if there is none of that name or
// another volume has it now, by the UUID that the device's volume keeps whatever
// it is called. Which one worked is what enter uses.
func (d *Device) info(ctx context.Context, addr string) (client.Export, error) {
	ctx, cancel := context.WithTimeout(ctx, infoTime)
	defer cancel()
	export, err := client.InfoTLS(ctx, addr, d.export(), d.cfg.tlsOf(addr))
	d.mu.Lock()
	backend, byID := d.status.Backend, d.byID
	d.mu.Unlock()
	if _, notUUID := block.ParseUUID(backend); notUUID != nil {
		return export, err
	}
	var refused *client.OptionError
	unknown := errors.As(err, &refused) && refused.Reply == wire.RepErrUnknown
	if !unknown && (err != nil || backendOf(export, d.cfg) == backend) {
		return export, err
	}
	other := backend
	if byID {
		other = d.cfg.Export
	}
	found, foundErr := client.InfoTLS(ctx, addr, other, d.cfg.tlsOf(addr))
	if foundErr != nil || backendOf(found, d.cfg) != backend {
		return export, err
	}
	d.mu.Lock()
	d.byID = !byID
	d.mu.Unlock()
	if !byID {
		d.cfg.Log.Warn("the volume has another name now; it is asked for by its UUID", "volume", d.cfg.Export, "uuid", backend)
	}
	return found, nil
}

// export is what the export is asked for by.
func (d *Device) export() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.byID {
		return d.status.Backend
	}
	return d.cfg.Export
}

// order returns the gateways, beginning with first.
func order(all []string, first string) []string {
	out := make([]string, 0, len(all))
	for _, g := range all {
		if g == first {
			out = append(out, g)
		}
	}
	for _, g := range all {
		if g != first {
			out = append(out, g)
		}
	}
	return out
}

// enter makes a connection that is ready for the kernel.
func (d *Device) enter(ctx context.Context, addr string, number uint32) (int, client.Export, error) {
	ctx, cancel := context.WithTimeout(ctx, enterTime)
	defer cancel()
	d.mu.Lock()
	session := wire.Session{ID: d.session, Connection: number, Incarnation: d.status.Incarnation}
	d.mu.Unlock()
	nc, export, err := client.Enter(ctx, addr, client.Options{Export: d.export(), Session: session, TLS: d.cfg.tlsOf(addr)})
	if err != nil {
		return -1, export, err
	}
	if secured, ok := nc.(*tls.Conn); ok {
		fd, err := d.tunnels.open(secured)
		return fd, export, err
	}
	defer nc.Close()
	fd, err := socketOf(nc)
	return fd, export, err
}

// shutAll gives up all connections, so that they are made anew elsewhere.
func (d *Device) shutAll() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i := range d.slots {
		if !d.slots[i].dead {
			shutdown(d.slots[i].fd)
		}
	}
}

// probe asks the server in use for the size, and whether it still answers.
func (d *Device) probe(ctx context.Context) {
	tick := time.NewTicker(probeEvery)
	defer tick.Stop()
	answered := d.cfg.Clock.Now()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		s := d.Status()
		export, err := d.info(ctx, s.Gateway)
		now := d.cfg.Clock.Now()
		switch {
		case err == nil:
			answered = now
			d.follow(export)
		case s.Live == 0:
			answered = now
		case now.Sub(answered) > stuckTime && d.otherAnswers(ctx, s.Gateway):
			d.cfg.Log.Warn("gateway answers nobody; leaving it", "gateway", s.Gateway, "err", err)
			answered = now
			d.demote(s.Gateway)
			d.shutAll()
		}
	}
}

func (d *Device) otherAnswers(ctx context.Context, not string) bool {
	for _, addr := range d.cfg.Gateways {
		if addr != not {
			if _, err := d.info(ctx, addr); err == nil {
				return true
			}
		}
	}
	return false
}

// demote makes the next round begin with another gateway.
func (d *Device) demote(addr string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, g := range d.cfg.Gateways {
		if g != addr {
			d.next = g
			return
		}
	}
}

// follow makes the device as large as a volume that has grown. The kernel stops
// the device's queue for it, and waits for requests in flight: it is asked by a
// goroutine of its own, one at a time, and only while all connections live.
func (d *Device) follow(e client.Export) {
	size := int64(e.Bytes) / int64(d.cfg.BlockBytes) * int64(d.cfg.BlockBytes)
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.growing || size <= d.status.Bytes || d.status.Live < len(d.slots) || backendOf(e, d.cfg) != d.status.Backend {
		return
	}
	d.growing = true
	index, backend := d.status.Index, d.status.Backend
	d.calls.Go(func() {
		err := d.kernel.Resize(index, backend, size)
		d.mu.Lock()
		d.growing = false
		if err == nil {
			d.status.Bytes = size
		}
		d.mu.Unlock()
		if err != nil {
			d.cfg.Log.Warn("device does not follow its volume's size", "device", devicePath(index), "err", err)
			return
		}
		d.cfg.Log.Info("device has grown with its volume", "device", devicePath(index), "bytes", size)
		d.changed()
	})
}
