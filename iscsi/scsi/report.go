package scsi

// reportOpcodes is REPORT SUPPORTED OPERATION CODES (SPC-4, 6.35).
func (k *call) reportOpcodes() {
	option, timeouts := k.cdb[2]&7, k.cdb[2]&0x80 != 0
	opcode, action := k.cdb[3], int(be16(k.cdb[4:]))
	allocated := uint64(be32(k.cdb[6:]))
	if option == 0 {
		k.answer(allCommands(timeouts), allocated)
		return
	}
	var found *command
	for i := range commands {
		c := &commands[i]
		if c.opcode != opcode {
			continue
		}
		switch {
		case option == 1 && c.action >= 0:
			k.fail(invalidCDB(2))
			return
		case option == 2 && c.action < 0:
			k.fail(invalidCDB(2))
			return
		case option > 3:
		case c.action < 0 && (option == 1 || option == 3 && action == 0) || c.action == action && option != 1:
			found = c
		}
	}
	if option > 3 {
		k.fail(invalidCDB(2))
		return
	}
	out := []byte{0, 1, 0, 0} // not supported
	if found != nil {
		out[1] = 3
		if timeouts {
			out[1] |= 0x80
		}
		out = append(out, found.opcode)
		usage := append([]byte(nil), found.usage...)
		if found.action >= 0 {
			usage[0] = usage[0]&^0x1f | byte(found.action)
		}
		out = append(out, usage...)
		putBE16(out[2:], uint16(found.length))
		if timeouts {
			out = appendTimeouts(out)
		}
	}
	k.answer(out, allocated)
}

func allCommands(timeouts bool) []byte {
	out := make([]byte, 4, 4+20*len(commands))
	for _, c := range commands {
		row := [8]byte{0: c.opcode, 7: byte(c.length)}
		if c.action >= 0 {
			putBE16(row[2:], uint16(c.action))
			row[5] |= 0x01
		}
		if timeouts {
			row[5] |= 0x02
		}
		out = append(out, row[:]...)
		if timeouts {
			out = appendTimeouts(out)
		}
	}
	putBE32(out, uint32(len(out)-4))
	return out
}

// appendTimeouts appends a command timeouts descriptor that recommends nothing.
func appendTimeouts(dst []byte) []byte { return append(dst, 0, 10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0) }

// reportTaskMgmt is REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS (SPC-4, 6.36).
func (k *call) reportTaskMgmt() {
	const abortTask, abortTaskSet, clearTaskSet, unitReset, targetReset = 0x80, 0x40, 0x10, 0x08, 0x04
	out := []byte{abortTask | abortTaskSet | clearTaskSet | unitReset | targetReset, 0, 0, 0}
	if k.cdb[2]&0x80 != 0 { // REPD
		out = append(out, make([]byte, 12)...)
		out[3] = 12
	}
	k.answer(out, uint64(be32(k.cdb[6:])))
}

// Asymmetric access states.
const (
	accessOptimized = 0x0
	accessSupports  = 0x01 // T_SUP.. AO_SUP: active/optimized only
)

// reportGroups is REPORT TARGET PORT GROUPS (SPC-4, 6.37): the group of the port
// that asks, through which the unit is active.
func (k *call) reportGroups() {
	extended := k.cdb[1]>>5 == 1
	var body []byte
	if k.n != nil {
		body = append(body, accessOptimized, accessSupports)
		body = appendBE16(body, k.n.Group)
		body = append(body, 0, 0 /* status: no change */, 0, 1 /* ports */, 0, 0)
		body = appendBE16(body, k.n.Port)
	}
	out := make([]byte, 4, 8+len(body))
	if extended {
		out = append(out, 0x10, 0, 0, 0)
	}
	out = append(out, body...)
	putBE32(out, uint32(len(out)-4))
	k.answer(out, uint64(be32(k.cdb[6:])))
}
