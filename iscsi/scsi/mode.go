package scsi

// modeState is what MODE SELECT can change: one set for all nexuses, which is
// lost when the last of them leaves.
type modeState struct {
	descriptor bool // D_SENSE
	protected  bool // SWP
}

// Mode pages.
const (
	pageRecovery   = 0x01
	pageReconnect  = 0x02
	pageCaching    = 0x08
	pageControl    = 0x0a
	pageExceptions = 0x1c
	pageAll        = 0x3f
	subpageAll     = 0xff
)

// Bits of the control page.
const (
	controlDSense = 0x04 // byte 2
	controlSWP    = 0x08 // byte 4
)

func (u *Unit) descriptorSense() bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.mode.descriptor
}

func (u *Unit) softwareProtected() bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.mode.protected
}

// modePage gives a page of the state m; nil if there is no such page.
func modePage(page, subpage byte, m modeState) []byte {
	switch {
	case subpage != 0 && subpage != subpageAll:
		if page == pageControl && subpage == 0x01 { // control extension
			p := make([]byte, 32)
			p[0], p[1] = 0x40|pageControl, 1
			p[3] = 28
			p[4] = 0
			p[6] = SenseLen
			return p
		}
		return nil
	case page == pageRecovery:
		return []byte{page, 10, 0xc0 /* AWRE, ARRE */, 0, 0, 0, 0, 0, 0, 0, 0, 0}
	case page == pageReconnect:
		return append([]byte{page, 14}, make([]byte, 14)...)
	case page == pageCaching: // WCE=0: an answered write is durable
		return append([]byte{page, 18, 0}, make([]byte, 17)...)
	case page == pageControl:
		p := []byte{page, 10, 0x02 /* GLTSD */, 0x10 /* unrestricted reordering */, 0, 0x40 /* TAS */, 0, 0, 0xff, 0xff, 0, 0}
		if m.descriptor {
			p[2] |= controlDSense
		}
		if m.protected {
			p[4] |= controlSWP
		}
		return p
	case page == pageExceptions:
		return []byte{page, 10, 0x08 /* DEXCPT */, 0, 0, 0, 0, 0, 0, 0, 0, 0}
	}
	return nil
}

// changeable is the page with ones where MODE SELECT may change it.
func changeable(page, subpage byte) []byte {
	p := modePage(page, subpage, modeState{})
	if p == nil {
		return nil
	}
	from := 2
	if p[0]&0x40 != 0 {
		from = 4
	}
	clear(p[from:])
	if page == pageControl && subpage == 0 {
		p[2], p[4] = controlDSense, controlSWP
	}
	return p
}

func (k *call) modeSense() {
	long := k.cdb[0] == opModeSense10
	page, subpage, control := k.cdb[2]&0x3f, k.cdb[3], k.cdb[2]>>6
	allocated, headerLen := uint64(k.cdb[4]), 4
	if long {
		allocated, headerLen = at7(k.cdb), 8
	}
	if control == 3 { // saved values are not kept
		k.fail(sense{keyIllegal, 0x3900, 0, false, -1, false})
		return
	}
	k.u.mu.Lock()
	state := k.u.mode
	k.u.mu.Unlock()
	if control == 2 {
		state = modeState{}
	}
	pages := []byte{page}
	if page == pageAll {
		pages = []byte{pageRecovery, pageReconnect, pageCaching, pageControl, pageExceptions}
	}
	var body []byte
	for _, p := range pages {
		subpages := []byte{subpage}
		if subpage == subpageAll {
			subpages = []byte{0, 1}
		}
		for _, sub := range subpages {
			if control == 1 {
				body = append(body, changeable(p, sub)...)
			} else {
				body = append(body, modePage(p, sub, state)...)
			}
		}
	}
	if body == nil {
		k.fail(invalidCDB(2))
		return
	}
	const wp, dpofua = 0x80, 0x10
	specific := byte(dpofua)
	if k.u.dev.Geometry().ReadOnly || state.protected {
		specific |= wp
	}
	descriptor := k.blockDescriptor(long)
	out := make([]byte, headerLen, headerLen+len(descriptor)+len(body))
	out = append(append(out, descriptor...), body...)
	if long {
		putBE16(out, uint16(len(out)-2))
		out[3] = specific
		if len(descriptor) == 16 {
			out[4] = 1 // LONGLBA
		}
		putBE16(out[6:], uint16(len(descriptor)))
	} else {
		out[0], out[2], out[3] = byte(len(out)-1), specific, byte(len(descriptor))
	}
	k.answer(out, allocated)
}

// blockDescriptor is empty if DBD asks for that.
func (k *call) blockDescriptor(long bool) []byte {
	const dbd, llbaa = 0x08, 0x10
	n, bs := k.u.blocks(), uint32(k.u.blockBytes())
	switch {
	case k.cdb[1]&dbd != 0:
		return nil
	case long && k.cdb[1]&llbaa != 0:
		return appendBE32(append(appendBE64(nil, n), 0, 0, 0, 0), bs)
	}
	return appendBE32(appendBE32(nil, uint32(min(n, 0xffffffff))), bs)
}

// modeSelect changes D_SENSE and SWP; a list that asks for anything else that is
// not so already is refused as a whole.
func (k *call) modeSelect() {
	long := k.cdb[0] == opModeSelect10
	n, headerLen := at4(k.cdb), 4
	if long {
		n, headerLen = at7(k.cdb), 8
	}
	const pf, sp = 0x10, 0x01
	if k.cdb[1]&pf == 0 || k.cdb[1]&sp != 0 {
		k.fail(invalidCDB(1))
		return
	}
	if n == 0 {
		return
	}
	p := k.list(n)
	if len(p) < headerLen || uint64(len(p)) < n {
		k.fail(illegal(ascParameterListLength))
		return
	}
	descriptors := int(p[3])
	if long {
		descriptors = int(be16(p[6:]))
	}
	if descriptors > len(p)-headerLen || descriptors%8 != 0 {
		k.fail(invalidList(headerLen - 1))
		return
	}
	k.u.mu.Lock()
	next := k.u.mode
	k.u.mu.Unlock()
	for at := headerLen + descriptors; at < len(p); {
		used, bad := next.apply(p[at:])
		if bad >= 0 {
			k.fail(invalidList(at + bad))
			return
		}
		if used == 0 {
			k.fail(illegal(ascParameterListLength))
			return
		}
		at += used
	}
	k.u.mu.Lock()
	changed := next != k.u.mode
	k.u.mode = next
	k.u.mu.Unlock()
	if changed {
		k.u.Attention(k.n, attentionMode)
	}
}

// apply takes one page at the head of p and returns its length, 0 if it is cut
// short; bad is the first byte that cannot be so, or -1.
func (m *modeState) apply(p []byte) (used, bad int) {
	if len(p) < 2 {
		return 0, -1
	}
	page, subpage, from := p[0]&0x3f, byte(0), 2
	if p[0]&0x40 != 0 {
		if len(p) < 4 {
			return 0, -1
		}
		subpage, from = p[1], 4
	}
	current := modePage(page, subpage, *m)
	if current == nil || page == pageAll || subpage == subpageAll {
		return 0, 0
	}
	length := int(p[1]) + 2
	if from == 4 {
		length = int(be16(p[2:])) + 4
	}
	if length != len(current) {
		return 0, from - 1
	}
	if len(p) < length {
		return 0, -1
	}
	mask := changeable(page, subpage)
	for i := from; i < length; i++ {
		if (p[i]^current[i])&^mask[i] != 0 {
			return 0, i
		}
	}
	if page == pageControl && subpage == 0 {
		m.descriptor, m.protected = p[2]&controlDSense != 0, p[4]&controlSWP != 0
	}
	return length, -1
}

// startStop is accepted: there is no power to save, and no medium to load.
func (k *call) startStop() {
	const loej = 0x02
	if k.cdb[4]&loej != 0 {
		k.fail(invalidCDB(4))
	}
}

// preventAllow is for media that can be removed; this one cannot.
func (k *call) preventAllow() { k.fail(illegal(ascInvalidOpcode)) }
